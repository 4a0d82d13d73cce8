"""pack, post and regularization of the CPU library against the reference and the authors' rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cpu_cases import (
    DTYPES,
    GRANULARITIES,
    SURROGATES,
    Memory,
    assert_sums_as_accurate,
    kept_count,
    needs_library,
    ops,
    pack,
    post,
    real,
    same,
    threshold_of,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import authors
from ops.tolerance import assert_as_accurate

from dst_kernels import reference
from dst_kernels.reference.regularization import sparse_regularization_and_slope
from dst_kernels.reference.weight import broadcast_threshold

pytestmark = needs_library

NO_GUARD = (-1, 0)
NAN, INF = math.nan, math.inf
KINDS = list(itertools.product(SURROGATES, (0, 1)))
of_two_dtypes = pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "{}-{}".format(*pair)
)


def operands(dtype):
    """Weights of all shapes, each with a threshold of each granularity."""
    weights = [weight for weight in weights_of(dtype) for _ in GRANULARITIES]
    granularities = itertools.cycle(GRANULARITIES)
    return weights, [threshold_of(w, g) for w, g in zip(weights, granularities, strict=False)]


def check_gradients(grad, weight, threshold, setting, of_weight, of_threshold):
    surrogate, structure = reference.SURROGATES[setting[0]], bool(setting[1])
    plain = reference.masked_weight_backward(grad, weight, threshold, surrogate, structure)
    exact = reference.masked_weight_backward(
        grad.double(), weight.double(), threshold.double(), surrogate, structure
    )
    assert of_weight.stride() == weight.stride() and of_threshold.stride() == threshold.stride()
    assert_as_accurate(of_weight, plain[0], exact[0])
    each = broadcast_threshold(threshold.double(), weight).expand_as(weight)
    _, summands = reference.masked_weight_backward(
        grad.double(), weight.double(), each, surrogate, structure
    )
    of_size = summands.square()
    if threshold.shape != weight.shape:
        rows = weight.shape[0] if threshold.numel() == weight.shape[0] else 1
        of_size = of_size.reshape(rows, weight.numel() // max(rows, 1)).sum(1)
    assert_sums_as_accurate(of_threshold, plain[1], exact[1], of_size.sqrt())


@of_two_dtypes
def test_pack_is_exactly_the_reference(dtypes):
    dtype, masked_dtype = dtypes
    weights, thresholds = operands(dtype)
    masked, effective, kept, stored = pack(
        weights, thresholds, [NO_GUARD] * len(weights), [masked_dtype] * len(weights)
    )
    for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
        same(masked[i], reference.masked_weight(weight, threshold, None, masked_dtype)[0])
        same(effective[i], threshold)
        same(stored[i], threshold)
        assert kept[i] == kept_count(weight, threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_rounds_as_torch_does(dtype):
    """Every 16-bit pattern as a weight, and what lies between two of them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for half in (torch.float16, torch.bfloat16):
        exact = bits.view(half).float()
        following = (bits + 1).view(half).float()
        between = exact + (following - exact) * 0.5
        weights = [
            bits.view(half), exact, between, between.nextafter(exact), between.nextafter(following)
        ]  # fmt: skip
        weights.append(between.double() * (1 + 1e-12))
        thresholds = [torch.tensor([-1.0], dtype=real(w.dtype)) for w in weights]
        masked, *_ = pack(weights, thresholds, [NO_GUARD] * len(weights), [dtype] * len(weights))
        for ours, weight in zip(masked, weights, strict=True):
            same(ours, weight.to(dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_of_special_values(dtype, granularity):
    smallest = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, smallest, -smallest / 2, INF, -INF, NAN]
    limits = torch.tensor([0.0, -0.0, 0.5, 1.0, -1.0, smallest, INF, -INF, NAN], dtype=real(dtype))
    rows = torch.tensor(values, dtype=dtype).repeat(len(limits), 1)
    weights, thresholds = {
        "row": ([rows], [limits]),
        "layer": ([row[None] for row in rows], list(limits[:, None])),
        "element": ([rows], [limits[:, None].repeat(1, len(values))]),
    }[granularity]
    for masked_dtype in DTYPES:
        masked, _, kept, _ = pack(
            weights, thresholds, [NO_GUARD] * len(weights), [masked_dtype] * len(weights)
        )
        for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
            same(masked[i], reference.masked_weight(weight, threshold, None, masked_dtype)[0])
            assert kept[i] == kept_count(weight, threshold)


@pytest.mark.parametrize("commit", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(5, 7), (1, 33000), (40, 1000)])
def test_the_guard_fires_up_to_its_count(shape, granularity, commit):
    """The same layer under guards below, at and above its kept count, in one call."""
    weight = torch.randn(shape)
    weight[0, 0], weight[-1, -1] = 0.0, NAN
    threshold = threshold_of(weight, granularity)
    count = kept_count(weight, threshold)
    guards = [-1, 0, count - 1, count, count + 1, weight.numel()]
    dtypes = [DTYPES[i % 4] for i in range(len(guards))]
    masked, effective, kept, stored = pack(
        [weight] * len(guards), [threshold] * len(guards), [(c, commit) for c in guards], dtypes
    )
    for i, collapsed in enumerate(guards):
        under = torch.zeros_like(threshold) if count <= collapsed else threshold
        same(masked[i], reference.masked_weight(weight, under, None, dtypes[i])[0])
        same(effective[i], under)
        same(stored[i], under if commit else threshold)
        assert kept[i] == kept_count(weight, under)


def test_the_guard_leaves_empty_weights_alone():
    weights, thresholds = [torch.empty(0, 3), torch.empty(2, 0)], [torch.empty(0), torch.ones(2)]
    _, effective, kept, stored = pack(weights, thresholds, [(0, 1)] * 2, [torch.float32] * 2)
    same(effective[1], thresholds[1])
    same(stored[1], thresholds[1])
    assert kept.tolist() == [0, 0]


@of_two_dtypes
def test_outputs_that_are_not_given_are_made(dtypes):
    grad_dtype, dtype = dtypes
    weights, thresholds = operands(dtype)
    grads = [torch.empty_like(weight, dtype=grad_dtype).normal_() for weight in weights]
    rules, guards = [(0, 1)] * len(weights), [NO_GUARD] * len(weights)
    flat = [int(number) for pair in guards for number in pair]
    expected = pack(weights, thresholds, guards, [grad_dtype] * len(weights))[:2]
    expected += pack(weights, thresholds, guards, [dtype] * len(weights))[:2]
    expected += post(grads, weights, thresholds, rules)
    made = ops().pack(weights, thresholds, flat, dtype=grad_dtype)
    made += ops().pack(weights, thresholds, flat)
    made += ops().post(grads, weights, thresholds, [0, 1] * len(weights))
    for ours, theirs in zip(itertools.chain(*made), itertools.chain(*expected), strict=True):
        same(ours, theirs)
    given = ops().pack(weights, thresholds, flat, made[0])
    assert given[0][0] is made[0][0] and given[1][0] is not made[1][0]


@of_two_dtypes
def test_post_is_as_accurate_as_the_reference(dtypes):
    grad_dtype, dtype = dtypes
    weights, thresholds = operands(dtype)
    grads = [torch.empty_like(weight, dtype=grad_dtype).normal_() for weight in weights]
    for turn in range(2):  # all granularities meet all kinds
        kinds = itertools.cycle(KINDS[turn:] + KINDS[:turn])
        settings = [kind for kind, _ in zip(kinds, weights, strict=False)]
        results = post(grads, weights, thresholds, settings)
        for each in zip(grads, weights, thresholds, settings, *results, strict=True):
            check_gradients(*each)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_post_agrees_with_the_authors_rule(kind):
    """On numbers that are exact in float32, and so are ties and the surrogates' corners."""
    weight = torch.arange(-16, 17).repeat(9, 1) / 8
    threshold = torch.arange(-4, 5) / 4
    grad = torch.randint(-3, 4, weight.shape).float()
    (of_weight,), (of_threshold,) = post([grad], [weight], [threshold], [kind])
    expected = authors.gradients(
        grad, weight, threshold, reference.SURROGATES[kind[0]], bool(kind[1])
    )
    torch.testing.assert_close(of_weight.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_threshold.double(), expected[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_post_of_special_values(kind):
    """Every weight beside every threshold, one for each, so that no sum hides anything."""
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 0.9, INF, -INF, NAN])
    limits = torch.tensor([0.0, -0.0, -0.5, 0.5, 1.0, 2.0, -1.0, INF, -INF, NAN])
    weight = values.repeat(len(limits), 1)
    threshold = limits[:, None].repeat(1, len(values))
    for value in (1.0, -2.0, 0.0, INF, NAN):
        grad = torch.full_like(weight, value)
        (of_weight,), (of_threshold,) = post([grad], [weight], [threshold], [kind])
        expected = reference.masked_weight_backward(
            grad, weight, threshold, reference.SURROGATES[kind[0]], bool(kind[1])
        )
        for ours, truth in zip((of_weight, of_threshold), expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_nan_gradient_reaches_both_results_and_no_other_row(granularity):
    weight = torch.rand(3, 5) + 0.2
    threshold = threshold_of(weight, granularity).fill_(0.1)
    grad = torch.ones(3, 5)
    grad[1, 2] = NAN
    (of_weight,), (of_threshold,) = post([grad], [weight], [threshold], [(0, 1)])
    assert of_weight.isnan().tolist() == grad.isnan().tolist()
    assert of_threshold.isnan().any()
    if granularity == "row":
        assert of_threshold.isnan().tolist() == [False, True, False]


def test_sums_over_no_weights_are_zero():
    weights = [torch.empty(2, 0), torch.empty(2, 0), torch.empty(0, 2)]
    thresholds = [torch.ones(2), torch.ones(1), torch.ones(1)]
    _, of_thresholds = post(weights, weights, thresholds, [(0, 1)] * 3)
    for result in of_thresholds:
        same(result, torch.zeros_like(result))


def test_dw_may_be_written_over_g():
    weight, threshold, grad = torch.randn(4, 1000), torch.rand(4), torch.randn(4, 1000)
    (expected,), _ = post([grad], [weight], [threshold], [(0, 1)])
    ops().post([grad], [weight], [threshold], [0, 1], [grad], [torch.empty(4)])
    same(grad, expected)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_mix_of_sizes_dtypes_and_kinds(data):
    count = data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    weights, thresholds, guards, kinds, dtypes, grads = [], [], [], [], [], []
    for _ in range(count):
        shape = data.draw(st.sampled_from([(st.integers(0, 40),), (st.integers(0, 1600),)]))
        shape = data.draw(st.tuples(st.integers(0, 30), *shape))
        weight = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        weights.append(weight)
        thresholds.append(threshold_of(weight, data.draw(st.sampled_from(GRANULARITIES))))
        guards.append((data.draw(st.sampled_from([-1, 0, weight.numel() // 2])), 1))
        kinds.append(data.draw(st.sampled_from(KINDS)))
        dtypes.append(data.draw(st.sampled_from(DTYPES)))
        grads.append(torch.randn(shape).to(data.draw(st.sampled_from(DTYPES))))
    masked, effective, kept, stored = pack(weights, thresholds, guards, dtypes)
    for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
        fires = weight.numel() > 0 and kept_count(weight, threshold) <= guards[i][0]
        under = torch.zeros_like(threshold) if fires else threshold
        same(masked[i], reference.masked_weight(weight, under, None, dtypes[i])[0])
        same(effective[i], under)
        same(stored[i], under)
        assert kept[i] == kept_count(weight, under)
    results = post(grads, weights, thresholds, kinds)
    for each in zip(grads, weights, thresholds, kinds, *results, strict=True):
        check_gradients(*each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_regularization(dtype):
    thresholds = [torch.empty(n).uniform_(-3, 3) for n in (1, 7, 512, 513, 40000, 0)]
    thresholds.append(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    thresholds.append(torch.randn(()))
    thresholds.append(torch.tensor([-100.0, -64.0, -63.5, 1000.0, 1e6, INF]))
    check_regularization([threshold.to(dtype) for threshold in thresholds[:-1]])
    check_regularization([threshold.to(dtype) for threshold in thresholds])
    check_regularization([])
    for value in (NAN, -INF):
        total, (slope,) = regularization([torch.tensor([1.0, value], dtype=dtype)])
        expected = sparse_regularization_and_slope(torch.tensor([1.0, value], dtype=dtype))
        same(total, expected[0])
        torch.testing.assert_close(slope, expected[1], equal_nan=True)


def test_regularization_of_mixed_dtypes():
    thresholds = [torch.randn(5), torch.randn(7, dtype=torch.float64)]
    value, slopes = regularization(thresholds)
    together = torch.cat([threshold.double() for threshold in thresholds])
    expected, _ = sparse_regularization_and_slope(together)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    assert [slope.dtype for slope in slopes] == [torch.float32, torch.float64]


def regularization(thresholds):
    memory = Memory()
    doubles = any(threshold.dtype == torch.float64 for threshold in thresholds)
    value = memory.unwritten(torch.zeros((), dtype=torch.float64 if doubles else torch.float32))
    slopes = [memory.unwritten(threshold) for threshold in thresholds]
    ops().regularization(memory.copies(thresholds), value, slopes)
    memory.check()
    return value, slopes


def check_regularization(thresholds):
    value, slopes = regularization(thresholds)
    flat = [threshold.reshape(-1) for threshold in thresholds]
    together = torch.cat(flat) if flat else torch.zeros(0)
    plain, _ = sparse_regularization_and_slope(together)
    exact, slope = sparse_regularization_and_slope(together.double())
    assert_sums_as_accurate(value, plain, exact, slope.norm())
    for slope, threshold in zip(slopes, thresholds, strict=True):
        _, plain = sparse_regularization_and_slope(threshold)
        _, exact = sparse_regularization_and_slope(threshold.double())
        assert slope.stride() == threshold.stride()
        assert_as_accurate(slope, plain, exact)
