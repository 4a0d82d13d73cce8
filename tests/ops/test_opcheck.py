"""`torch.library.opcheck` on every op: schema, fake against real, and tracing with symbols.

Arguments are detached: the ops know nothing of autograd, the functions around them do.
"""

from __future__ import annotations

import pytest
import torch
from torch._ops import OpOverload
from torch.library import opcheck

from dst_kernels import ops
from dst_kernels.backends.compiled import library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {"row": [4], "scalar": [], "layer": [1], "element": [4, 6]}
SURROGATE = ("long_tailed", True)
BACKEND = "reference"  # the one with all ops on a CPU
BACKENDS = [BACKEND] if library.unavailable("cpu") else [BACKEND, "cpu"]  # with the weight's ops


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def check_weight_ops(weight, threshold, ratio, dtype, backend):
    opcheck(ops.effective_threshold, (weight, threshold, ratio, backend))
    opcheck(ops.masked_weight, (weight, threshold, ratio, dtype, backend))
    grad = torch.randn(weight.shape).to(weight.dtype)
    opcheck(ops.masked_weight_backward, (grad, weight, threshold, *SURROGATE, backend))


def test_every_op_is_checked_here():
    defined = {name for name in ops.__all__ if isinstance(getattr(ops, name), OpOverload)}
    assert defined == {
        "effective_threshold",
        "masked_weight",
        "masked_weight_backward",
        "masked_linear",
        "masked_linear_grad_input",
        "masked_linear_grad_weight",
        "masked_conv",
        "masked_conv_grad_input",
        "masked_conv_grad_weight",
        "sparse_linear",
        "sparse_conv",
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", list(SHAPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_ops(dtype, granularity, backend):
    weight, threshold = rand(4, 6, dtype=dtype), torch.rand(SHAPES[granularity])
    check_weight_ops(weight, threshold, 0.01, dtype, backend)
    if dtype == torch.bfloat16:
        for ratio in (None, 1.0):
            opcheck(ops.effective_threshold, (weight, threshold, ratio, backend))
        opcheck(ops.masked_weight, (weight, threshold, 1.0, torch.float32, backend))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_of_weight_and_threshold(layout):
    arrange = LAYOUTS[layout]
    weight, grad = arrange(rand(4, 6)), arrange(rand(4, 6))
    for threshold in (torch.rand(4), arrange(torch.rand(4, 6)), torch.rand(8)[::2]):
        for backend in BACKENDS:
            opcheck(ops.effective_threshold, (weight, threshold, 0.01, backend))
            opcheck(ops.masked_weight, (weight, threshold, None, torch.float32, backend))
            opcheck(ops.masked_weight_backward, (grad, weight, threshold, *SURROGATE, backend))
    input = arrange(rand(5, 6))
    threshold = torch.rand(8)[::2]
    opcheck(ops.masked_linear, (input, weight, threshold, None, 0.01, BACKEND))
    grad = arrange(rand(5, 4))
    opcheck(ops.masked_linear_grad_input, (grad, weight, threshold, BACKEND))
    opcheck(ops.masked_linear_grad_weight, (grad, input, weight, threshold, *SURROGATE, BACKEND))


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        *((torch.float32, batch) for batch in [(), (5,), (2, 3), (0,)]),
        *((dtype, (5,)) for dtype in DTYPES[1:3]),
    ],
    ids=str,
)
def test_linear(dtype, batch):
    input, weight = rand(*batch, 6, dtype=dtype), rand(4, 6, dtype=dtype)
    grad, threshold = rand(*batch, 4, dtype=dtype), torch.rand(4)
    for bias in (None, rand(4, dtype=dtype)):
        opcheck(ops.masked_linear, (input, weight, threshold, bias, None, BACKEND))
    opcheck(ops.masked_linear_grad_input, (grad, weight, threshold, BACKEND))
    opcheck(ops.masked_linear_grad_weight, (grad, input, weight, threshold, *SURROGATE, BACKEND))


@pytest.mark.parametrize(("rows", "columns"), [(0, 6), (4, 0)])
def test_linear_without_features(rows, columns):
    input, weight, threshold = rand(5, columns), rand(rows, columns), torch.rand(rows)
    for backend in BACKENDS:
        check_weight_ops(weight, threshold, 0.01, torch.float32, backend)
    opcheck(ops.masked_linear, (input, weight, threshold, rand(rows), 0.01, BACKEND))
    opcheck(ops.masked_linear_grad_input, (rand(5, rows), weight, threshold, BACKEND))
    opcheck(
        ops.masked_linear_grad_weight,
        (rand(5, rows), input, weight, threshold, *SURROGATE, BACKEND),
    )


CONVOLUTIONS = {
    "1d": ((2, 4, 7), (6, 2, 3), [2], [1], [1], 2),
    "2d": ((2, 4, 6, 5), (6, 4, 3, 2), [1, 2], [1, 0], [2, 1], 1),
    "2d-depthwise": ((2, 4, 5, 5), (4, 1, 3, 3), [1, 1], [1, 1], [1, 1], 4),
    "3d": ((1, 2, 4, 3, 4), (4, 2, 2, 2, 2), [1, 1, 2], [0, 1, 0], [1, 1, 1], 1),
    "2d-empty": ((0, 4, 5, 5), (6, 4, 3, 3), [1, 1], [0, 0], [1, 1], 1),
}


def check_convolution(input, weight, threshold, bias, geometry, arrange_grad=lambda t: t):
    arguments = (input, weight, threshold, bias, 0.01, *geometry, BACKEND)
    grad = arrange_grad(torch.randn_like(ops.masked_conv(*arguments)[0]))
    opcheck(ops.masked_conv, arguments)
    opcheck(
        ops.masked_conv_grad_input,
        (grad, list(input.shape), weight, threshold, *geometry, BACKEND),
    )
    opcheck(
        ops.masked_conv_grad_weight,
        (grad, input, weight, threshold, *geometry, *SURROGATE, BACKEND),
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CONVOLUTIONS),
        *(("2d", dtype) for dtype in DTYPES[1:3]),
    ],
    ids=str,
)
def test_convolution(name, dtype):
    input, weight, *geometry = CONVOLUTIONS[name]
    input, weight = rand(*input, dtype=dtype), rand(*weight, dtype=dtype)
    bias = None if name == "2d" else rand(weight.shape[0], dtype=dtype)
    check_convolution(input, weight, torch.rand(weight.shape[0]), bias, geometry)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("2d", "all"),
        *(
            pytest.param(name, which, marks=pytest.mark.slow)
            for name, which in [
                *(("2d", which) for which in ("input", "weight", "grad")),
                *((name, "all") for name in ("2d-depthwise", "3d", "2d-empty")),
                *(("3d", "input"), ("2d-depthwise", "weight")),
            ]
        ),
    ],
)
def test_convolution_in_channels_last(name, which):
    input, weight, *geometry = CONVOLUTIONS[name]
    format = FORMATS[len(input)]
    input, weight = rand(*input), rand(*weight)
    if which in ("input", "all"):
        input = input.contiguous(memory_format=format)
    if which in ("weight", "all"):
        weight = weight.contiguous(memory_format=format)
    threshold = torch.rand(weight.shape)
    if which == "all":
        threshold = threshold.contiguous(memory_format=format)
    if which == "all":
        for backend in BACKENDS:
            check_weight_ops(weight, threshold, 0.01, torch.float32, backend)
    check_convolution(
        input,
        weight,
        threshold,
        None,
        geometry,
        (lambda t: t.contiguous(memory_format=format))
        if which in ("grad", "all")
        else (lambda t: t.contiguous()),
    )


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 1)])
def test_convolution_where_memory_formats_are_ambiguous(channels, size):
    for format in (torch.contiguous_format, torch.channels_last):
        input = rand(2, channels, size, size).contiguous(memory_format=format)
        weight = rand(3, channels, 1, 1).contiguous(memory_format=format)
        check_convolution(
            input, weight, torch.rand(3), None, ([1, 1], [0, 0], [1, 1], 1), torch.Tensor.contiguous
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_of_strided_arguments(layout):
    arrange = LAYOUTS[layout]
    check_convolution(
        arrange(rand(2, 4, 6, 6)),
        arrange(rand(4, 4, 3, 3)),
        torch.rand(8)[::2],
        rand(8)[::2],
        ([1, 1], [1, 1], [1, 1], 1),
        arrange,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (5,), (0,)], ids=str)
def test_sparse_products(batch, backend):
    for dtype in (torch.float32, torch.bfloat16):
        weight = rand(4, 6, dtype=dtype) * (torch.rand(4, 6) < 0.5)
        parts = parts_of(weight)
        for bias in (None, rand(4, dtype=dtype)):
            opcheck(ops.sparse_linear, (rand(*batch, 6, dtype=dtype), *parts, bias, backend))
    if len(batch) == 1:
        weight = rand(4, 2, 3, 3) * (torch.rand(4, 2, 3, 3) < 0.3)
        input = rand(*batch, 4, 7, 6)
        rest = [3, 3], [1, 2], [1, 0], [1, 1], 2, backend
        for layout in (torch.contiguous_format, torch.channels_last):
            images = input.contiguous(memory_format=layout)
            opcheck(ops.sparse_conv, (images, *parts_of(weight), rand(4), *rest))


def parts_of(weight):
    flat = weight.flatten(1)
    rows, columns = flat.nonzero(as_tuple=True)
    starts = torch.zeros(len(flat) + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=len(flat)).cumsum(0)
    return flat[rows, columns], columns.to(torch.uint16), starts
