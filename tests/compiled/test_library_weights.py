"""The backends' functions over the libraries: any layout, dtype and granularity, one and many.

Which library runs is the device's choice: with a GPU these tests run there.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.tolerance import assert_as_accurate

from dst_kernels import reference
from dst_kernels.backends.compiled import library

NAME = "cuda" if torch.cuda.is_available() else "cpu"
if library.unavailable(NAME) is not None:
    pytest.skip(f"the {NAME} library: {library.unavailable(NAME)}", allow_module_level=True)

from dst_kernels.backends.compiled import ops  # noqa: E402

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([F64] if NAME == "cpu" else [])
THRESHOLD_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}
SHAPES = [(6, 10), (5, 4, 3, 2), (1, 7), (7, 1), (6, 4, 1, 1), (0, 3), (3, 0)]
every_layout = pytest.mark.parametrize("layout", list(LAYOUTS))


def thresholds(shape, dtype, device):
    """One of each kind; the last empties the layer. No float64 is one of float32, too."""
    for size in (shape[:1], (), (1,), shape):
        yield torch.rand(size, dtype=F64, device=device).to(dtype)
    yield torch.rand(2 * shape[0], dtype=F64, device=device).to(dtype)[::2]
    yield torch.full(shape[:1], 9.0, dtype=dtype, device=device)


def same(ours, expected, original):
    assert ours.dtype == expected.dtype
    assert ours.stride() == torch.empty_like(original).stride()
    # To the bit, and faster than assert_close by ten times.
    assert torch.equal(ours, expected), f"{original.dtype} {original.shape}: {ours}, {expected}"


@every_layout
def test_packing_is_the_reference_to_the_bit(layout, device):
    for shape, *dtypes in itertools.product(SHAPES, DTYPES, THRESHOLD_DTYPES):
        weight = LAYOUTS[layout](torch.randn(shape, dtype=F64, device=device).to(dtypes[0]))
        for threshold in thresholds(shape, dtypes[1], device):
            for ratio, dtype in ((None, weight.dtype), (0.01, torch.float16), (0.5, torch.float32)):
                arguments = weight, threshold, ratio
                ours = ops.masked_weight(*arguments, dtype)
                expected = reference.masked_weight(*arguments, dtype)
                same(ours[0], expected[0], weight)
                same(ours[1], expected[1], threshold)
                same(ops.effective_threshold(*arguments), expected[1], threshold)
                assert ours[1].numel() == 0 or ours[1].data_ptr() != threshold.data_ptr()


@every_layout
def test_gradients_are_as_accurate_as_the_reference(layout, device):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        weight = LAYOUTS[layout](torch.randn(shape, dtype=F64, device=device).to(dtype))
        # As the weight's sign is, mostly: else sums over a layer are small differences.
        grads = [
            arrange(((torch.randn(shape, device=device) + 1.5) * weight.sign()).to(dtype))
            for arrange in LAYOUTS.values()
        ]
        every = itertools.product(thresholds(shape, torch.float32, device), reference.SURROGATES)
        for (threshold, surrogate), grad in zip(every, itertools.cycle(grads), strict=False):
            arguments = grad, weight, threshold
            ours = ops.masked_weight_backward(*arguments, surrogate, True)
            plain = reference.masked_weight_backward(*arguments, surrogate, True)
            doubles = [tensor.double() for tensor in arguments]
            exact = reference.masked_weight_backward(*doubles, surrogate, True)
            likes = weight, threshold
            for result, close, truth, like in zip(ours, plain, exact, likes, strict=True):
                assert_as_accurate(result, close, truth)
                assert result.stride() == torch.empty_like(like).stride()


def drawn(device):
    """Segments of many sizes, layouts and dtypes in one call."""
    shapes = [(300, 20), (4, 3, 3, 3), (1, 5), (40, 900), (0, 3), (7, 5)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    weights[1] = LAYOUTS["channels_last"](weights[1])
    weights[2] = weights[2].to(torch.bfloat16)
    weights[3] = LAYOUTS["transposed"](weights[3])
    sizes = [(300,), (4, 3, 3, 3), (1,), (40,), (0,), ()]
    return weights, [torch.rand(size, device=device) * 2 for size in sizes]


def test_many_at_once_are_the_same_as_one_by_one(device):
    weights, stored = drawn(device)
    ratios = [None, 0.5, 0.9, 0.01, 0.5, 0.99]
    masked, effective = ops.masked_weights(weights, stored, ratios, [False] * 6, torch.bfloat16)
    for i, one in enumerate(zip(weights, stored, ratios, strict=True)):
        alone = ops.masked_weight(*one, torch.bfloat16)
        same(masked[i], alone[0], weights[i])
        same(effective[i], alone[1], stored[i])
    grads = [torch.randn(weight.shape, device=device) for weight in weights]
    options = ["long_tailed", "triangular"] * 3, [True, False, False] * 2
    of_weights, of_thresholds = ops.masked_weights_backward(grads, weights, effective, *options)
    for i, one in enumerate(zip(grads, weights, effective, *options, strict=True)):
        alone = ops.masked_weight_backward(*one)
        same(of_weights[i], alone[0], weights[i])
        same(of_thresholds[i], alone[1], effective[i])


@pytest.mark.parametrize("dtype", THRESHOLD_DTYPES, ids=str)
def test_a_reset_is_written_where_it_is_to_be_committed(dtype, device):
    weight = torch.randn(6, 8, device=device)
    for layout in LAYOUTS.values():
        for size in ((6,), (), (6, 8)):
            threshold = torch.full(size, 9.0, device=device).to(dtype)
            threshold = threshold if len(size) < 2 else layout(threshold).clone()
            kept = threshold.clone()
            arguments = [weight] * 2, [threshold, kept], [0.01, 0.01], [True, False], dtype
            masked, effective = ops.masked_weights(*arguments)
            assert not threshold.any() and bool((kept == 9).all())
            assert not effective[0].any() and torch.equal(masked[0], masked[1])


@pytest.mark.parametrize("dtype", [torch.float32, *([F64] if NAME == "cpu" else [])], ids=str)
@pytest.mark.parametrize("sizes", [(0,), (0, 0), (0, 5), (7, 0, 1)], ids=str)
def test_the_regulariser_of_shards_some_of_which_are_empty(sizes, dtype, device):
    parts = [torch.rand(size, dtype=dtype, device=device) for size in sizes]
    for result, expected in zip(
        ops.regularization(parts), reference.regularization(parts), strict=True
    ):
        torch.testing.assert_close(result, expected)
