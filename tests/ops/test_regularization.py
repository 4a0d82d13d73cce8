"""The sparse regulariser: sum of exp(-t), finite for every finite threshold."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from dst_kernels.functional import sparse_regularization

from . import authors


def test_value_and_gradient_are_those_of_the_formula():
    rows, scalar, element = torch.randn(5), torch.tensor(0.3), torch.randn(2, 3, 2)
    thresholds = [t.double().requires_grad_() for t in (rows, scalar, element)]
    value = sparse_regularization(thresholds)
    assert value.shape == () and value.dtype == torch.float64
    expected = authors.regularizer(thresholds)
    assert value.item() == pytest.approx(expected.item(), rel=1e-14)
    results = (torch.autograd.grad(each, thresholds) for each in (value, expected))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_accepts_one_tensor_a_list_and_a_generator():
    threshold = torch.tensor([0.0, 1.0])
    expected = pytest.approx(1 + math.exp(-1))
    assert sparse_regularization(threshold).item() == expected
    assert sparse_regularization([threshold]).item() == expected
    assert sparse_regularization(t for t in [threshold]).item() == expected


@pytest.mark.parametrize(
    "values", [[0.0, 0.5, -3.0], [-63.9, -64.1, -65.0], [-70.0, -100.0], [-64.5, 2.0]]
)
def test_gradcheck_on_both_sides_of_the_tangent(values):
    # Scaled, because finite differences of numbers near exp(64) have no absolute accuracy.
    threshold = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    scale = math.exp(min(min(values), 0.0) if min(values) > -64 else -64.0)
    assert gradcheck(lambda t: sparse_regularization(t) * scale, (threshold,))


def test_goes_on_along_the_tangent_below_minus_64():
    for t in (-64.0, -65.0, -100.0, -1000.0):
        threshold = torch.tensor([t], dtype=torch.float64, requires_grad=True)
        value = sparse_regularization(threshold)
        value.backward()
        tangent = math.exp(64) * (1 + (-t - 64))
        assert value.item() == pytest.approx(tangent, rel=1e-13)
        assert threshold.grad.item() == pytest.approx(-math.exp(64), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_below_zero_stays_finite_and_sgd_raises_the_threshold(dtype):
    threshold = torch.full((1000,), -100.0, dtype=dtype, requires_grad=True)
    value = sparse_regularization(threshold)
    assert value.dtype == torch.float32
    assert value.isfinite()
    if dtype == torch.float16:
        return  # exp(64) has no float16, and so no gradient
    value.backward()
    assert threshold.grad.isfinite().all()
    before = threshold.detach().clone()
    torch.optim.SGD([threshold], lr=1e-28).step()
    assert bool((threshold.detach() > before).all())


def test_sixteen_bit_thresholds_are_summed_in_float32():
    threshold = torch.zeros(5000, dtype=torch.bfloat16)
    value = sparse_regularization(threshold)
    assert value.dtype == torch.float32 and value.item() == 5000.0


def test_empty_and_nan():
    assert sparse_regularization(torch.zeros(0)).item() == 0.0
    assert sparse_regularization(torch.tensor([math.nan, 0.0])).isnan()


def test_infinite_threshold_adds_nothing():
    threshold = torch.tensor([math.inf, 0.0], requires_grad=True)
    value = sparse_regularization(threshold)
    value.backward()
    assert value.item() == 1.0
    assert threshold.grad.tolist() == [0.0, -1.0]


def test_mixed_dtypes_do_not_lose_the_wider_one():
    value = sparse_regularization([torch.zeros(2), torch.zeros(3, dtype=torch.float64)])
    assert value.dtype == torch.float64 and value.item() == 5.0


@pytest.mark.parametrize("empty", [[], (), iter([])])
def test_no_thresholds_is_an_error(empty):
    with pytest.raises(ValueError, match="thresholds must hold at least one tensor, but is empty"):
        sparse_regularization(empty)
