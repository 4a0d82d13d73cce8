"""Strides of every kind: results have those of the op's fake, numbers those of dense arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import check, gradient_along, normal, run, same, thresholds

from dst_kernels import reference

F16, F32 = torch.float16, torch.float32

poisoned = pytest.mark.usefixtures("poisoned")

LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "strided rows": lambda t: t.repeat_interleave(3, 0)[::3],
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded rows": lambda t: t[:1].expand_as(t),
    "expanded columns": lambda t: t[..., :1].expand_as(t),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}
every_layout = pytest.mark.parametrize("layout", list(LAYOUTS))


def one_by_one_and_all(tensors, layout):
    """The tensors by name: one in this layout and the others dense, for each, and all in it."""
    for which in (*tensors, "all"):
        yield {
            name: LAYOUTS[layout](tensor) if which in (name, "all") else tensor
            for name, tensor in tensors.items()
        }


@poisoned
@every_layout
def test_linear(layout, device):
    M, N, K = 6, 19, 37
    tensors = {
        "input": normal(M, K, device=device),
        "weight": normal(N, K, device=device),
        "threshold": thresholds((N, K), "element", device=device),
        "grad": normal(M, N, device=device),
    }
    for arranged in one_by_one_and_all(tensors, layout):
        input, weight, threshold, grad = arranged.values()
        for limit, ratio in ((threshold, 0.01), (threshold[:, 0], 1.0)):
            check("masked_linear", input, weight, limit, None, ratio)
            check("masked_linear_grad_input", grad, weight, limit)
            check("masked_linear_grad_weight", grad, input, weight, limit, "triangular", True)


@poisoned
@every_layout
@pytest.mark.parametrize("shape", [(7, 37), (4, 3, 2, 5)], ids=str)
def test_weight_ops(layout, shape, device):
    tensors = {
        "weight": normal(*shape, device=device),
        "threshold": thresholds(shape, "element", device=device),
        "grad": normal(*shape, device=device),
    }
    for arranged in one_by_one_and_all(tensors, layout):
        weight, threshold, grad = arranged.values()
        for limit, ratio in ((threshold, None), (threshold.flatten(1)[:, 0], 1.0)):
            same(
                run("masked_weight", weight, limit, ratio, F16),
                reference.masked_weight(weight, limit, ratio, F16),
            )
            same(
                run("effective_threshold", weight, limit, 0.5),
                reference.effective_threshold(weight, limit, 0.5),
            )
            check("masked_weight_backward", grad, weight, limit, "long_tailed", True)


FORMATS = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}


@poisoned
@pytest.mark.parametrize(
    "shape", [(6, 4, 3, 2), (6, 1, 3, 3), (6, 4, 1, 1), (1, 4, 3, 2), (4, 3, 2, 2, 3)], ids=str
)
def test_memory_formats(shape, device):
    """In any mix of contiguous and channels last; each result in its own argument's format."""
    mixes = [
        (granularity, mix)
        for granularity, tensors in (("row", 2), ("layer", 2), ("element", 3))
        for mix in itertools.product(FORMATS[len(shape)], repeat=tensors)
    ]
    for granularity, formats in mixes:
        weight = normal(*shape, device=device).contiguous(memory_format=formats[0])
        grad = gradient_along(weight).contiguous(memory_format=formats[1])
        threshold = thresholds(shape, granularity, device=device)
        if granularity == "element":
            threshold = threshold.contiguous(memory_format=formats[2])
        for ratio in (None, 1.0):
            same(
                run("masked_weight", weight, threshold, ratio, F32),
                reference.masked_weight(weight, threshold, ratio, F32),
            )
        check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


@poisoned
@pytest.mark.parametrize("granularity", ["row", "element"])
def test_all_orders_of_the_dimensions(granularity, device):
    """Some need a dense copy of the arguments: rows that are no single piece of memory."""
    shape = (3, 4, 2, 5)
    for order in itertools.permutations(range(4)):
        inverse = torch.argsort(torch.tensor(order)).tolist()
        weight = normal(*shape, device=device)
        weight = weight.permute(order).contiguous().permute(inverse)
        assert weight.shape == shape
        grad = gradient_along(weight).contiguous()
        threshold = thresholds(shape, granularity, device=device)
        for ratio in (None, 1.0):
            same(
                run("masked_weight", weight, threshold, ratio, F16),
                reference.masked_weight(weight, threshold, ratio, F16),
            )
        check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


@poisoned
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_strided_thresholds_and_biases(dtype, device):
    input, weight = normal(5, 33, device=device), normal(17, 33, device=device)
    grad, bias = normal(5, 17, device=device), normal(34, dtype=dtype, device=device)[::2]
    threshold = thresholds((34,), "row", dtype=dtype, device=device)
    for limit in (threshold[::2], threshold[:1].expand(17), threshold[3:4], threshold[3]):
        for ratio in (None, 0.01, 1.0):
            check("masked_linear", input, weight, limit, bias, ratio)
            same(
                run("effective_threshold", weight, limit, ratio),
                reference.effective_threshold(weight, limit, ratio),
            )
        check("masked_linear_grad_input", grad, weight, limit)


# -- beyond 2^31 elements --------------------------------------------------------------------------

STEP = 2**30


@pytest.fixture(scope="module")
def far_apart(device):
    """A function that puts two-dimensional tensors of three rows 2^30 elements apart.

    They share memory of which no more than those rows is touched.
    """
    memory = {}

    def place(tensor, slot):
        dtype = tensor.dtype
        if dtype not in memory:
            memory[dtype] = torch.empty(2 * STEP + 4096, dtype=dtype, device=tensor.device)
        view = memory[dtype].as_strided(tensor.shape, (STEP, 1), 1024 * slot)
        return view.copy_(tensor)

    return place


@pytest.mark.usefixtures("overflows_are_found")
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(transposed, far_apart, device):
    """Of arguments; a product of two 32-bit numbers would run over."""
    sizes = ((3, 40), (3, 40)) if transposed else ((3, 40), (40, 3))
    weight, other = (normal(*size, dtype=F16, device=device) for size in sizes)
    weight = far_apart(weight, 0)
    threshold = far_apart(thresholds((3, 40), "element", dtype=F16, device=device), 1)
    row = thresholds((3, 40), "row", device=device)
    input, grad = normal(3, 40, dtype=F16, device=device), normal(3, 3, dtype=F16, device=device)
    input = far_apart(input, 2)
    if transposed:
        weight, threshold, row = weight.t(), threshold.t(), row[:1].expand(40)
        grad, input = far_apart(normal(3, 40, dtype=F16, device=device), 2), other[:, :3]
    for limit in (threshold, row):
        same(
            run("masked_weight", weight, limit, 0.01, F16),
            reference.masked_weight(weight, limit, 0.01, F16),
        )
        check("masked_weight_backward", normal(*weight.shape, device=device), weight, limit,
              "long_tailed", True)  # fmt: skip
        check("masked_linear", input, weight, limit, None, 0.01)
        check("masked_linear_grad_input", grad, weight, limit)
        check("masked_linear_grad_weight", grad, input, weight, limit, "long_tailed", True)


@pytest.mark.gpu
def test_results_beyond_32_bits(device):
    """More than 2^31 weights, and more than 2^31 outputs; compared where 32 bits ran over."""
    N, K = 2**16 + 8, 2**15
    weight = torch.randn(N, K, dtype=F16, device=device)
    threshold = torch.rand(N, device=device)
    last = slice(-8, None)
    packed, effective = run("masked_weight", weight, threshold, None, F16)
    expected = reference.masked_weight(weight[last], threshold[last], None, F16)
    same((packed[last], effective[last]), expected)
    del packed
    arguments = weight[last], weight[last], threshold[last], "long_tailed", True
    exact = reference.masked_weight_backward(*arguments)
    ours = run("masked_weight_backward", weight, weight, threshold, "long_tailed", True)
    torch.testing.assert_close(ours[0][last], exact[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[1][last], exact[1], rtol=1e-4, atol=1e-2)
    del ours
    dy, x = torch.randn(16, N, dtype=F16, device=device), torch.randn(16, K, device=device).half()
    ours = run("masked_linear_grad_weight", dy, x, weight, threshold, "long_tailed", True)
    arguments = dy[:, last], x, weight[last], threshold[last], "long_tailed", True
    exact = reference.masked_linear_grad_weight(*arguments)
    torch.testing.assert_close(ours[0][last], exact[0], rtol=4e-3, atol=4e-3)
    del ours
    output, _ = run("masked_linear", x, weight, threshold, None, 0.01)
    exact, _ = reference.masked_linear(x, weight[last], threshold[last], None, None)
    torch.testing.assert_close(output[:, last], exact, rtol=1e-2, atol=0.5)
    del weight, output
    weight = torch.randn(2**14, 16, dtype=F16, device=device)
    input = torch.randn(2**17 + 8, 16, dtype=F16, device=device)
    output, _ = run("masked_linear", input, weight, threshold[: 2**14], None, 0.01)
    exact, _ = reference.masked_linear(input[last], weight, threshold[: 2**14], None, None)
    torch.testing.assert_close(output[last], exact, rtol=4e-3, atol=4e-3)
