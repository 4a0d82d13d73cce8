"""NaN is never masked away; infinite thresholds prune or keep like very large ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dst_kernels.functional as dst

pytestmark = pytest.mark.usefixtures("each_backend")

NAN, INF = math.nan, math.inf
SURROGATES = ("long_tailed", "rectangular", "triangular", "straight_through")
SHAPES = {"row": [2], "scalar": [], "layer": [1], "element": [2, 3]}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def masked_weight(weight, threshold, **options):
    return dst.masked_weight(weight, threshold, **options)


def masked_linear(weight, threshold, **options):
    return dst.masked_linear(torch.eye(3, dtype=weight.dtype), weight, threshold, **options).t()


def masked_conv(spatial):
    function = (dst.masked_conv1d, dst.masked_conv2d, dst.masked_conv3d)[spatial - 1]
    ones = [1] * spatial

    def run(weight, threshold, **options):
        kernel = weight.reshape(2, 3, *ones)
        if threshold.dim() == 2:
            threshold = threshold.reshape(2, 3, *ones)
        input = torch.eye(3, dtype=weight.dtype).reshape(3, 3, *ones)
        return function(input, kernel, threshold, **options).reshape(3, 2).t()

    run.__name__ = f"masked_conv{spatial}d"
    return run


OPS = [masked_weight, masked_linear, masked_conv(2)]


def weight_of(values, dtype):
    return torch.tensor(values, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_weight_reaches_output_and_gradients(op, dtype):
    for granularity, limit in itertools.product(SHAPES, (0.0, 0.5, 100.0, -1.0)):
        weight = weight_of([[NAN, 1.0, 0.1], [1.0, 1.0, 1.0]], dtype)
        threshold = torch.full(SHAPES[granularity], limit).requires_grad_()
        output = op(weight, threshold, reset_ratio=None)
        assert output[0].isnan().any(), limit
        assert not output[1].isnan().any() or op is not masked_weight
        output.sum().backward()
        assert weight.grad[0].isnan().any() and threshold.grad.isnan().any()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_nan_threshold_reaches_output_and_gradients(op, surrogate):
    for granularity, dtype in itertools.product(SHAPES, DTYPES):
        weight = weight_of([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]], dtype)
        threshold = torch.zeros(SHAPES[granularity])
        threshold.view(-1)[0] = NAN
        threshold.requires_grad_()
        output = op(weight, threshold, surrogate=surrogate)
        governed = {"row": (0,), "scalar": (), "layer": (), "element": (0, 0)}[granularity]
        assert output[governed].isnan().all()
        if op is masked_weight:
            assert output.isnan().sum() == output[governed].numel()
        output.sum().backward()
        assert weight.grad[governed].isnan().any()
        assert threshold.grad.view(-1)[0].isnan()


def test_mask_counts_nan_as_kept():
    for dtype in DTYPES:
        weight = torch.tensor([[NAN, 0.1], [0.1, 2.0]], dtype=dtype)
        mask = dst.threshold_mask(weight, torch.tensor([1.0, 1.0]), reset_ratio=None)
        assert mask.tolist() == [[True, False], [False, True]]
        mask = dst.threshold_mask(weight, torch.tensor([NAN, 1.0]), reset_ratio=None)
        assert mask.tolist() == [[True, True], [False, True]]


def test_guard_with_nan_thresholds_does_not_reset():
    for shape in SHAPES.values():
        threshold = torch.full(shape, NAN)
        effective = dst.effective_threshold(torch.randn(2, 3), threshold, reset_ratio=0.9)
        assert effective.isnan().all()


def test_guard_resets_healthy_rows_only_with_the_whole_layer():
    weight = torch.full((100, 10), 0.1)
    threshold = torch.full((100,), 5.0)
    threshold[0] = NAN
    kept_one_hundredth = dst.effective_threshold(weight, threshold)
    assert not kept_one_hundredth.isnan().any() and not kept_one_hundredth.any()
    more = threshold.clone()
    more[1] = NAN
    assert torch.equal(dst.effective_threshold(weight, more).isnan(), more.isnan())


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_infinite_threshold_prunes_without_nan(op, surrogate):
    for granularity, dtype in itertools.product(SHAPES, DTYPES):
        weight = weight_of([[1.0, -2.0, 0.0], [3.0, 1.0, 1.0]], dtype)
        threshold = torch.full(SHAPES[granularity], INF).requires_grad_()
        output = op(weight, threshold, reset_ratio=None, surrogate=surrogate)
        assert output.tolist() == [[0.0] * 3] * 2
        output.sum().backward()
        assert weight.grad.isfinite().all() and threshold.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_minus_infinite_threshold_keeps_everything(op, surrogate):
    for granularity, dtype in itertools.product(SHAPES, DTYPES):
        weight = weight_of([[1.0, -2.0, 0.0], [3.0, 1.0, 1.0]], dtype)
        threshold = torch.full(SHAPES[granularity], -INF).requires_grad_()
        output = op(weight, threshold, surrogate=surrogate)
        assert torch.equal(output.detach(), weight.detach())
        output.sum().backward()
        assert weight.grad.isfinite().all() and threshold.grad.isfinite().all()


def test_guard_turns_an_infinite_threshold_into_zero():
    weight = torch.tensor([[1.0, -2.0]])
    assert torch.equal(dst.masked_weight(weight, torch.tensor([INF])), weight)


def test_infinite_weight_is_kept_by_finite_thresholds():
    for dtype, value, shape in itertools.product(DTYPES, (INF, -INF), ([], [1], [1, 3])):
        weight = torch.tensor([[value, 0.25, 1.0]], dtype=dtype)
        output = dst.masked_weight(weight, torch.full(shape, 0.5))
        assert output.tolist() == [[value, 0.0, 1.0]]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_diverged_gradient_is_not_hidden(surrogate, value):
    """By the formula, in which 0 * NaN is NaN; beyond the surrogate's support and within."""
    heights = {"long_tailed": [0.4, 0.0, 0.0], "rectangular": [0.0, 0.0, 0.0]}
    heights |= {"triangular": [0.25, 0.0, 0.0], "straight_through": [1.0, 1.0, 1.0]}
    weight = torch.tensor([[2.25, -0.25, 3.0]] * 2, requires_grad=True)  # kept, pruned, kept
    threshold = torch.tensor([1.5, 1.5], requires_grad=True)
    slope = torch.tensor(heights[surrogate])
    for column in range(3):
        dense = torch.ones(2, 3)
        dense[0, column] = value
        output = dst.masked_weight(weight, threshold, reset_ratio=None, surrogate=surrogate)
        grads = torch.autograd.grad(output, (weight, threshold), dense)
        kept = torch.tensor([1.0, 0.0, 1.0]) > 0
        through = dense * slope
        expected = torch.where(kept, dense, 0.0) + through * weight.abs()
        torch.testing.assert_close(grads[0], expected, equal_nan=True)
        torch.testing.assert_close(grads[1], -(through * weight).sum(1), equal_nan=True)
        assert grads[1].isfinite().tolist() == [False, True]


def test_non_finite_inputs_pass_through_kept_weights():
    for value in (NAN, INF):
        weight = (0.2 + 0.6 * torch.rand(4, 3)).requires_grad_()
        threshold = torch.full((4,), 0.1).requires_grad_()
        input = torch.randn(2, 3)
        input[1, 0] = value
        output = dst.masked_linear(input, weight, threshold)
        assert output[0].isfinite().all() and not output[1].isfinite().any()
        output.sum().backward()
        assert not weight.grad[:, 0].isfinite().any() and weight.grad[:, 1:].isfinite().all()
        assert not threshold.grad.isfinite().any()
