"""The fused products against the reference: dtypes, shapes, granularities, the guard."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.tolerance import TF32Products
from torch.nn import functional as F
from triton_cases import (
    GRANULARITIES,
    SURROGATES,
    check,
    every_granularity,
    normal,
    on_gpu,
    run,
    same,
    thresholds,
)

from dst_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16

# input, weight, threshold
DTYPES = [
    pytest.param(F32, F32, F32, id="float32"),
    pytest.param(F16, F16, F32, id="float16"),
    pytest.param(F16, F32, F32, id="float16 autocast"),
    pytest.param(F16, F16, F16, id="float16 threshold"),
    pytest.param(BF16, BF16, F32, id="bfloat16", marks=on_gpu),
    pytest.param(BF16, F32, F32, id="bfloat16 autocast", marks=on_gpu),
]
every_dtype = pytest.mark.parametrize(("of_input", "dtype", "of_threshold"), DTYPES)

# M, N, K: one of each, tails in each, more than one tile of each.
SHAPES = [
    (1, 1, 1),
    (1, 3, 17),
    (3, 63, 1),
    (17, 1, 65),
    (65, 130, 63),
    (130, 63, 130),
    (2, 200, 150),
    (100, 17, 33),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arguments(shape, granularity, dtypes, device):
    """(input, weight, threshold, bias, grad).

    The gradient makes that of the threshold a sum of large numbers of one sign, not their small
    difference, in which the error of a single result says nothing.
    """
    (M, N, K), (of_input, dtype, of_threshold) = shape, dtypes
    weight = normal(N, K, dtype=dtype, device=device)
    input = normal(M, K, dtype=of_input, device=device)
    threshold = thresholds((N, K), granularity, dtype=of_threshold, device=device)
    grad = (input.double() @ weight.double().t() / K**0.5).to(of_input)
    return input, weight, threshold, normal(N, dtype=dtype, device=device), grad


def check_all(shape, granularity, dtypes, device):
    input, weight, threshold, bias, grad = arguments(shape, granularity, dtypes, device)
    check("masked_linear", input, weight, threshold, bias, 0.01)
    check("masked_linear_grad_input", grad, weight, threshold)
    check("masked_linear_grad_weight", grad, input, weight, threshold, "long_tailed", True)


@every_shape
@pytest.mark.parametrize("granularity", ["row", "element"])
def test_all_shapes_in_float32(shape, granularity, device):
    check_all(shape, granularity, (F32, F32, F32), device)


@every_dtype
@every_granularity
@pytest.mark.parametrize("shape", [(3, 17, 65), (17, 130, 40)], ids=str)
def test_all_dtypes(shape, of_input, dtype, of_threshold, granularity, device):
    check_all(shape, granularity, (of_input, dtype, of_threshold), device)


def test_the_yardstick_of_tf32_cuts_off_what_tensor_cores_do():
    input, weight, bias = torch.full((2, 3), 1 + 2**-11), torch.ones(4, 3), torch.full((4,), 2**-20)
    with TF32Products():
        for product in (input @ weight.t(), F.conv1d(input[..., None], weight[..., None])[..., 0]):
            assert bool((product == 3).all())
        assert bool((F.linear(input, weight, bias) == 3 + 2**-20).all())
        assert bool((input.double() @ weight.double().t() > 3).all())


@pytest.mark.gpu
@every_shape
def test_float32_that_may_round_to_tf32(shape, device, float32_products):
    float32_products(torch.backends.cuda.matmul, "tf32")
    check_all(shape, "row", (F32, F32, F32), device)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", [(16, 1000, 4096), (1000, 1030, 520), (4096, 768, 257)], ids=str)
def test_sizes_that_fill_a_gpu(shape, of_input, dtype, of_threshold, device):
    check_all(shape, "row", (of_input, dtype, of_threshold), device)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_all_surrogates(surrogate, device):
    for granularity, of_input, structure_gradient in (
        ("row", F32, True), ("row", F16, False), ("layer", F16, True), ("layer", F32, False),
        ("element", F32, True), ("element", F16, False),
    ):  # fmt: skip
        input, weight, threshold, _, grad = arguments(
            (5, 17, 33), granularity, (of_input, F32, F32), device
        )
        options = surrogate, structure_gradient
        check("masked_linear_grad_weight", grad, input, weight, threshold, *options)


@pytest.mark.parametrize("of_input", [F32, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 17), (5, 130, 65), (70, 33, 1)], ids=str)
def test_the_guard_decides_exactly(shape, of_input, device):
    """At the ratio thresholds count as 0 for the whole product; one weight above it they do not."""
    for granularity in ("row", "layer", "element"):
        input, weight, threshold, bias, _ = arguments(
            shape, granularity, (of_input, F32, F32), device
        )
        kept = reference.threshold_mask(weight, threshold).sum().item()
        for counted in {kept - 1, kept, kept + 1} & set(range(weight.numel() + 1)):
            ratio, fires = counted / weight.numel(), counted >= kept
            _, effective = check("masked_linear", input, weight, threshold, bias, ratio)
            same((effective,), torch.zeros_like(threshold) if fires else threshold)


@pytest.mark.parametrize("ratio", [None, 0.01, 1.0])
def test_a_layer_without_a_bias(ratio, device):
    for granularity in GRANULARITIES:
        input, weight, threshold, *_ = arguments((5, 17, 33), granularity, (F32, F32, F32), device)
        check("masked_linear", input, weight, threshold, None, ratio)


@pytest.mark.parametrize("of_bias", [F16, F32, pytest.param(BF16, marks=on_gpu)], ids=str)
@pytest.mark.parametrize("of_input", [F16, F32], ids=str)
def test_a_bias_of_any_dtype(of_input, of_bias, device):
    input, weight, threshold, bias, _ = arguments((5, 17, 33), "row", (of_input, F32, F32), device)
    check("masked_linear", input, weight, threshold, bias.to(of_bias), None)


@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_batches_of_any_rank(batch, device):
    weight, threshold = normal(17, 33, device=device), thresholds((17, 33), "row", device=device)
    input, grad = normal(*batch, 33, device=device), normal(*batch, 17, device=device)
    output, _ = check("masked_linear", input, weight, threshold, None, 0.01)
    assert output.shape == (*batch, 17)
    (grad_input,) = check("masked_linear_grad_input", grad, weight, threshold)
    assert grad_input.shape == input.shape
    run("masked_linear_grad_weight", grad, input, weight, threshold, "long_tailed", True)


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 3), (2, 0, 0), (0, 0, 0)],
    ids=str,
)
def test_sizes_of_zero(shape, device):
    M, N, K = shape
    input, grad = normal(M, K, device=device), normal(M, N, device=device)
    weight, bias = normal(N, K, device=device), normal(N, device=device)
    for granularity, ratio in itertools.product(GRANULARITIES, (None, 0.01, 1.0)):
        threshold = thresholds((N, K), granularity, device=device)
        for name, *args in (
            ("masked_linear", input, weight, threshold, bias, ratio),
            ("masked_linear", input, weight, threshold, None, ratio),
            ("masked_linear_grad_input", grad, weight, threshold),
            ("masked_linear_grad_weight", grad, input, weight, threshold, "long_tailed", True),
            ("masked_weight", weight, threshold, ratio, F16),
            ("effective_threshold", weight, threshold, ratio),
        ):
            same(run(name, *args), getattr(reference, name)(*args))
        if weight.numel() == 0:
            args = weight.clone(), weight, threshold, "triangular", False
            same(run("masked_weight_backward", *args), reference.masked_weight_backward(*args))


@pytest.mark.parametrize("name", ["input", "weight", "threshold"])
def test_float64_is_refused_by_name(name, device):
    tensors = {
        "input": normal(2, 3, device=device),
        "weight": normal(4, 3, device=device),
        "threshold": torch.rand(4, device=device),
    }
    tensors[name] = tensors[name].double()
    input, weight, threshold = tensors.values()
    grad = normal(2, 4, dtype=input.dtype, device=device)
    for op in (
        lambda: run("masked_linear", input, weight, threshold, None, 0.01),
        lambda: run("masked_linear_grad_input", grad, weight, threshold),
        lambda: run(
            "masked_linear_grad_weight", grad, input, weight, threshold, "triangular", True
        ),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .*Use path='packed'"):
            op()
