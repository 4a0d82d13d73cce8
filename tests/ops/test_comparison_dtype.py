"""|w| > t is decided in the wider of the two dtypes: a rounded threshold would flip the mask."""

from __future__ import annotations

import itertools

import pytest
import torch

import dst_kernels.functional as dst

pytestmark = pytest.mark.usefixtures("each_backend")

# A weight that bfloat16 (float16) has, and float32 thresholds that round onto it.
CASES = {torch.bfloat16: 1e-4, torch.float16: 1e-5}
SHAPES = ([], [1], [2], [2, 2])
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def case(dtype, shape):
    """Row 0's first weight is kept and pruned by thresholds that both round to the weight."""
    weight = torch.tensor([[0.5, 3.0], [-0.5, -3.0]], dtype=dtype)
    below = torch.full(shape, 0.5 - CASES[dtype])
    above = torch.full(shape, 0.5 + CASES[dtype])
    assert bool((below.to(dtype) == 0.5).all()) and bool((above.to(dtype) == 0.5).all())
    return weight, below, above


@pytest.mark.parametrize("dtype", list(CASES), ids=str)
def test_sixteen_bit_weights_are_compared_in_float32(dtype):
    for shape in SHAPES:
        weight, below, above = case(dtype, shape)
        pruned = torch.tensor([[0.0, 3.0], [0.0, -3.0]], dtype=dtype)
        for threshold, expected in ((below, weight), (above, pruned)):
            assert torch.equal(dst.masked_weight(weight, threshold), expected)
            assert torch.equal(dst.threshold_mask(weight, threshold), expected != 0)
            assert dst.remaining_ratio(weight, threshold).item() == (expected != 0).float().mean()
            identity = torch.eye(2, dtype=dtype)
            assert torch.equal(dst.masked_linear(identity, weight, threshold), expected.t())
            of_kernel = threshold[..., None] if threshold.dim() == 2 else threshold
            convolved = dst.masked_conv1d(identity[..., None], weight[..., None], of_kernel)
            assert torch.equal(convolved[..., 0], expected.t())


@pytest.mark.parametrize("dtype", list(CASES), ids=str)
def test_gradients_use_the_same_mask(dtype):
    def weight_alone(weight, threshold):
        return dst.masked_weight(weight, threshold, structure_gradient=False)

    def linear(weight, threshold):
        ones = torch.ones(1, 2, dtype=dtype)
        return dst.masked_linear(ones, weight, threshold, structure_gradient=False)

    def convolution(weight, threshold):
        ones = torch.ones(1, 2, 1, dtype=dtype)
        threshold = threshold[..., None] if threshold.dim() == 2 else threshold
        return dst.masked_conv1d(ones, weight[..., None], threshold, structure_gradient=False)

    for shape, run in itertools.product(SHAPES, (weight_alone, linear, convolution)):
        weight, below, above = case(dtype, shape)
        weight.requires_grad_()
        for threshold, kept in ((below, 1.0), (above, 0.0)):
            weight.grad = None
            run(weight, threshold).sum().backward()
            assert weight.grad.tolist() == [[kept, 1.0], [kept, 1.0]]


@pytest.mark.parametrize("dtype", list(CASES), ids=str)
def test_guard_counts_with_the_same_mask(dtype):
    for shape in SHAPES:
        weight, below, above = case(dtype, shape)
        assert torch.equal(dst.effective_threshold(weight, below, reset_ratio=0.5), below)
        assert not dst.effective_threshold(weight, above, reset_ratio=0.5).any()


def test_float32_weights_beside_float64_thresholds_are_compared_in_float64():
    weight = torch.ones(1, 4)
    for shape in ([], [1], [1, 4]):
        threshold = torch.full(shape, 1.0 - 2.0**-40, dtype=torch.float64)
        assert dst.threshold_mask(weight, threshold).all()
        assert torch.equal(dst.masked_weight(weight, threshold), weight)
        threshold = torch.full(shape, 1.0 + 2.0**-40, dtype=torch.float64)
        assert not dst.masked_weight(weight, threshold, reset_ratio=None).any()


def test_sixteen_bit_thresholds_beside_float32_weights():
    weight = torch.tensor([[0.5 + 1e-4, 0.5, 0.5 - 1e-4]])
    for threshold in (torch.tensor([0.5]), torch.tensor(0.5)):
        kept = dst.threshold_mask(weight, threshold.bfloat16())
        assert kept.tolist() == [[True, False, False]]


def test_equality_prunes_and_signed_zeros_are_pruned_by_zero():
    for dtype in DTYPES:
        weight = torch.tensor([[0.5, -0.5, 0.0, -0.0, 1.0]], dtype=dtype)
        at_half = dst.masked_weight(weight, torch.tensor([0.5]))
        assert at_half.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]]
        at_zero = dst.threshold_mask(weight, torch.tensor([0.0]))
        assert at_zero.tolist() == [[True, True, False, False, True]]
        assert torch.equal(at_zero, dst.threshold_mask(weight, torch.tensor([-0.0])))
        negative = dst.threshold_mask(weight, torch.tensor([-0.25]))
        assert negative.all(), "below zero everything is kept, zeros too"


def test_dtype_argument_rounds_after_the_comparison():
    for dtype, out in itertools.product(DTYPES, DTYPES):
        weight = torch.randn(8, 8).to(dtype).requires_grad_()
        threshold = weight.detach().abs().double().mean(1).float()
        result = dst.masked_weight(weight, threshold, dtype=out)
        kept = weight.detach().double().abs() > threshold.double()[:, None]
        assert result.dtype == out
        assert torch.equal(result.detach(), (weight.detach() * kept).to(out))
        result.sum().backward()
        assert weight.grad.dtype == dtype
