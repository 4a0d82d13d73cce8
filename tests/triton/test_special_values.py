"""Ties, signed zeros, negative thresholds, NaN and infinity: the reference's answer to each."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from triton_cases import SURROGATES, every_axis, run, same

from dst_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

NAN, INF = math.nan, math.inf
F16, F32, F64 = torch.float16, torch.float32, torch.float64

# Exact in every dtype, as are their products and the sums of those.
WEIGHTS = [0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0, 0.75]
LIMITS = [0.0, -0.0, 0.25, 0.5, 1.0, 2.0, -0.25, -1.0]
NON_FINITE = [NAN, INF, -INF]


def grid(limits, weights, granularity, dtype, device):
    """Every weight beside every limit; a list of limits to try one by one where one governs all."""
    weight = torch.tensor(weights, dtype=dtype, device=device).repeat(len(limits), 1)
    column = torch.tensor(limits, device=device)
    by_granularity = {
        "row": [column],
        "element": [column[:, None].repeat(1, len(weights))],
        "layer": column.split(1),
        "scalar": column.unbind(),
    }
    return weight, by_granularity[granularity]


def close(ours, expected):
    """NaN and infinity in the same places; else a rounding apart (a GPU fuses a * b + c)."""
    for result, truth in zip(ours, expected, strict=True):
        eps = torch.finfo(truth.dtype).eps
        torch.testing.assert_close(result, truth, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@every_axis
def test_pack(granularity, device):
    weights = [*WEIGHTS, NAN, INF, -INF]
    for dtype in (F16, F32, F64):
        weight, candidates = grid([*LIMITS, NAN, -INF], weights, granularity, dtype, device)
        for threshold, ratio in itertools.product(candidates, (None, 0.0, 0.5, 1.0)):
            same(
                run("masked_weight", weight, threshold, ratio, dtype),
                reference.masked_weight(weight, threshold, ratio, dtype),
            )


@every_axis
def test_an_infinite_threshold_prunes_all_finite_weights(granularity, device):
    weight, candidates = grid([INF, INF], WEIGHTS, granularity, F32, device)
    for threshold in candidates:
        packed, effective = run("masked_weight", weight, threshold, None, F32)
        assert not packed.any() and bool((effective == INF).all())
        packed, effective = run("masked_weight", weight, threshold, 0.0, F32)
        assert torch.equal(packed, weight) and not effective.any()
        product, effective = run(
            "masked_linear", torch.eye(len(WEIGHTS), device=device), weight, threshold, None, 0.0
        )
        assert torch.equal(product, weight.t()) and not effective.any()


@every_axis
def test_post(granularity, device):
    for surrogate, (dtype, structure_gradient) in itertools.product(
        SURROGATES, ((F32, True), (F64, False))
    ):
        weight, candidates = grid(LIMITS, WEIGHTS, granularity, dtype, device)
        grad = torch.linspace(0.01, 1, weight.numel(), dtype=dtype, device=device).view_as(weight)
        grad = grad.copysign(weight)  # so that sums in another order are a rounding apart, too
        for threshold in candidates:
            arguments = grad, weight, threshold, surrogate, structure_gradient
            close(
                run("masked_weight_backward", *arguments),
                reference.masked_weight_backward(*arguments),
            )


@every_axis
def test_gradients_beside_nan_and_infinity(granularity, device):
    """By post and by the fused kernel, whose G is the same."""
    weights = [*WEIGHTS, *NON_FINITE]
    weight, candidates = grid([*LIMITS, NAN, -INF], weights, granularity, F32, device)
    dense = torch.linspace(-1, 1, weight.numel(), device=device).view_as(weight)
    dy, x = torch.eye(len(dense), device=device), dense
    for threshold, surrogate in itertools.product(candidates, SURROGATES):
        options = threshold, surrogate, True
        expected = reference.masked_weight_backward(dense, weight, *options)
        close(run("masked_weight_backward", dense, weight, *options), expected)
        for value in NON_FINITE:
            diverged = torch.full_like(dense, value), weight, *options
            expected_of_it = reference.masked_weight_backward(*diverged)
            close(run("masked_weight_backward", *diverged), expected_of_it)
        close(run("masked_linear_grad_weight", dy, x, weight, *options), expected)


def test_nan_in_one_row_stays_there(device):
    """Beyond the tile's edges numbers are zero, and zero times NaN is NaN."""
    weight, grad = torch.ones(5, 7, device=device), torch.ones(5, 7, device=device)
    dy, x = torch.eye(5, device=device), torch.ones(5, 7, device=device)
    for limits, of_weight in (((NAN, 0.5), 1.0), ((0.5, 0.5), NAN)):
        threshold = torch.full((5,), limits[1], device=device)
        threshold[2], weight[2, 3] = limits[0], of_weight
        for ours in (
            run("masked_weight_backward", grad, weight, threshold, "long_tailed", True),
            run("masked_linear_grad_weight", dy, x, weight, threshold, "long_tailed", True),
        ):
            assert ours[1].isnan().tolist() == [False, False, True, False, False]
            assert ours[0].isnan().any(1).tolist() == [False, False, True, False, False]
        output, _ = run("masked_linear", x, weight, threshold, None, 0.01)
        assert output.isnan().any(0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@every_axis
def test_products(granularity, dtype, device):
    """Whole rows are compared at once, so that a NaN weight says nothing about its neighbours."""
    weight, candidates = grid(LIMITS, WEIGHTS, granularity, dtype, device)
    identity = torch.eye(len(WEIGHTS), dtype=dtype, device=device)
    of_rows = torch.eye(len(LIMITS), dtype=dtype, device=device)
    for threshold in candidates:
        masked = reference.masked_weight(weight, threshold, None, dtype)[0]
        for ratio in (None, 0.0):
            expected = reference.masked_linear(identity, weight, threshold, None, ratio)
            same(run("masked_linear", identity, weight, threshold, None, ratio), expected)
        same(run("masked_linear_grad_input", of_rows, weight, threshold), masked)


@every_axis
def test_products_with_nan(granularity, device):
    limits = [*LIMITS, NAN]
    weight, candidates = grid(limits, WEIGHTS, granularity, F32, device)
    weight[1, 2] = NAN
    identity = torch.eye(len(WEIGHTS), device=device)
    of_rows = torch.eye(len(limits), device=device)
    for threshold in candidates:
        expected = reference.masked_linear(identity, weight, threshold, None, 0.01)
        same(run("masked_linear", identity, weight, threshold, None, 0.01), expected)
        expected = reference.masked_linear_grad_input(of_rows, weight, threshold)
        same(run("masked_linear_grad_input", of_rows, weight, threshold), expected)


@every_axis
def test_the_guard_counts_whatever_the_threshold_is(granularity, device):
    """In sizes that fill no tile: what lies beyond the edges must not be counted."""
    input = torch.ones(2, len(WEIGHTS), device=device)
    for limit in (*LIMITS, NAN, INF, -INF):
        weight, (threshold, *_) = grid([limit] * 3, WEIGHTS, granularity, F32, device)
        kept = reference.threshold_mask(weight, threshold).sum().item()
        for counted in {kept - 1, kept} & set(range(weight.numel() + 1)):
            ratio = counted / weight.numel()
            expected = torch.zeros_like(threshold) if counted == kept else threshold
            same(run("effective_threshold", weight, threshold, ratio), expected)
            same(run("masked_linear", input, weight, threshold, None, ratio)[1:], expected)


def test_the_comparison_is_made_before_rounding(device):
    """Under autocast the stored weight decides; in float16 all of these are equal."""
    weight = torch.tensor([[0.5, 0.50001, 0.49999, -0.50001]], device=device)
    for shape in ([], [1], [1, 4]):
        threshold = torch.full(shape, 0.5, device=device)
        kept = torch.tensor([[0.0, 0.5, 0.0, -0.5]], dtype=F16, device=device)
        same(run("masked_weight", weight, threshold, None, F16)[:1], kept)
        identity = torch.eye(4, dtype=F16, device=device)
        same(run("masked_linear", identity, weight, threshold, None, None)[:1], kept.t())
        one = torch.ones(1, 1, dtype=F16, device=device)
        same(run("masked_linear_grad_input", one, weight, threshold), kept)
    threshold = torch.tensor([0.5 + 1e-12], dtype=F64, device=device)
    weight = torch.tensor([[0.5, 0.5 + 2e-12]], dtype=F64, device=device)
    packed, _ = run("masked_weight", weight, threshold, None, F32)
    assert packed.tolist() == [[0.0, 0.5]]
