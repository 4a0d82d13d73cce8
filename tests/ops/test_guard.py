"""The collapse guard: at the ratio it resets, one weight above it does not; nothing is written."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels.nn import MaskedConv2d, MaskedLinear
from dst_kernels.reference.weight import largest_collapsed_count

pytestmark = pytest.mark.usefixtures("each_backend")

GRANULARITIES = {"row": [20], "scalar": [], "layer": [1], "element": [20, 25]}


def weight_with(kept, shape=(20, 25), dtype=torch.float32):
    """`kept` weights of magnitude 1, in random places and signs; the others are 0.25."""
    weight = torch.full(shape, 0.25)
    places = torch.randperm(weight.numel())[:kept]
    weight.view(-1)[places] = torch.where(torch.rand(kept) < 0.5, -1.0, 1.0)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_five_of_500_reset_at_one_hundredth_and_six_do_not(dtype):
    for shape in GRANULARITIES.values():
        threshold = torch.full(shape, 0.5)
        for kept, resets in ((0, True), (4, True), (5, True), (6, False), (500, False)):
            weight = weight_with(kept, dtype=dtype)
            effective = dst.effective_threshold(weight, threshold)
            assert torch.equal(effective, torch.zeros_like(threshold) if resets else threshold), (
                kept
            )
            remaining = 500 if resets else kept
            assert dst.threshold_mask(weight, threshold).sum() == remaining
            assert dst.remaining_ratio(weight, threshold).item() == pytest.approx(remaining / 500)
            assert (dst.masked_weight(weight, threshold) != 0).sum() == remaining
            product = dst.masked_linear(torch.eye(25, dtype=dtype), weight, threshold)
            assert (product != 0).sum() == remaining
            if threshold.dim() < 2:
                kernel = weight.view(20, 5, 5)
                product = dst.masked_conv1d(
                    torch.eye(25, dtype=dtype).view(25, 5, 5), kernel, threshold
                )
                assert (product != 0).sum() == remaining


def test_other_ratios():
    threshold = torch.full((20,), 0.5)
    for ratio, kept, resets in (
        *((0, 0, True), (0, 1, False), (0.0, 0, True), (1, 500, True), (1.0, 499, True)),
        *((0.5, 250, True), (0.5, 251, False), (0.002, 1, True), (0.0019, 1, False)),
        *((0.0019, 0, True), (None, 0, False), (None, 500, False)),
    ):
        effective = dst.effective_threshold(weight_with(kept), threshold, reset_ratio=ratio)
        assert bool((effective == 0).all()) == resets, (ratio, kept)


def test_without_a_guard_nothing_may_remain():
    weight, threshold = weight_with(0), torch.full((20,), 0.5)
    assert not dst.masked_weight(weight, threshold, reset_ratio=None).any()
    assert dst.remaining_ratio(weight, threshold, reset_ratio=None).item() == 0.0


def test_the_whole_layer_is_reset_not_single_rows():
    weight = torch.full((100, 10), 0.25)
    weight[:2] = 1.0
    threshold = torch.full((100,), 0.5)
    assert torch.equal(dst.effective_threshold(weight, threshold), threshold), "2 % remain"
    weight[1] = 0.25
    assert not dst.effective_threshold(weight, threshold).any(), "1 % remains"


def test_gradients_after_a_reset_are_those_at_zero():
    weight = torch.rand(4, 50) + 0.1
    results = []
    for value in (9.0, 0.0):
        leaves = (weight.clone().requires_grad_(), torch.full((4,), value, requires_grad=True))
        results.append(torch.autograd.grad(dst.masked_weight(*leaves).sin().sum(), leaves))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_functional_ops_never_write_and_return_new_memory():
    weight, threshold = weight_with(0), torch.full((20,), 0.5)
    effective = dst.effective_threshold(weight, threshold)
    dst.masked_weight(weight, threshold)
    dst.masked_linear(torch.randn(2, 25), weight, threshold)
    assert threshold._version == 0 and bool((threshold == 0.5).all())
    for ratio in (0.01, None):
        effective = dst.effective_threshold(weight_with(500), threshold, reset_ratio=ratio)
        assert effective.data_ptr() != threshold.data_ptr()
        assert not effective.requires_grad


def test_effective_threshold_has_no_gradient():
    weight = torch.rand(20, 25, requires_grad=True)
    threshold = torch.rand(20, requires_grad=True)
    assert not dst.effective_threshold(weight, threshold).requires_grad
    assert not dst.remaining_ratio(weight, threshold).requires_grad
    assert not dst.threshold_mask(weight, threshold).requires_grad


@pytest.mark.parametrize("make", [lambda: MaskedLinear(25, 20), lambda: MaskedConv2d(25, 20, 1)])
def test_only_a_training_forward_commits(make):
    layer = make()
    input = torch.randn(2, 25, 1, 1) if isinstance(layer, MaskedConv2d) else torch.randn(2, 25)
    layer.reset_threshold(9.0)
    layer.eval()
    in_evaluation = layer(input)
    assert bool((layer.threshold == 9.0).all())
    layer.train()
    in_training = layer(input)
    assert not layer.threshold.any()
    assert torch.equal(in_evaluation, in_training)


def test_largest_count_is_exact():
    generator = random.Random(0)
    sizes = [*range(1, 400), *(generator.randrange(1, 10**10) for _ in range(2000))]
    sizes += [500, 266_200, 430_500, 14_977_728, 2**24, 2**24 + 1, 2**31, 2**40]
    for text in ("0.01", "0.1", "0.3", "0.005", "0.07", "0.5", "0.999", "0", "1"):
        exact = Fraction(text)
        for size in sizes:
            expected = exact.numerator * size // exact.denominator
            assert largest_collapsed_count(size, float(text)) == expected, (size, text)


def test_largest_count_of_ratios_that_are_counts():
    """count / size as a float must reset exactly `count` weights, whatever it rounds to."""
    generator = random.Random(1)
    for _ in range(2000):
        size = generator.randrange(1, 10**7)
        count = generator.randrange(size + 1)
        assert largest_collapsed_count(size, count / size) == count


def test_counts_beyond_sixteen_bit_and_float32_integers():
    """A bfloat16 sum would stop counting at 256, a float16 one overflow at 65504."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.zeros(300, 400, dtype=dtype)
        threshold = torch.full((300,), 0.5)
        weight.view(-1)[:1200] = 1
        assert not dst.effective_threshold(weight, threshold).any()
        weight.view(-1)[1200] = 1
        assert bool(dst.effective_threshold(weight, threshold).all())


def test_rows_longer_than_float32_counts_exactly():
    row = 2**24 + 8
    weight = torch.zeros(1, row, dtype=torch.bfloat16)
    weight[0, :3] = 1
    threshold = torch.full((1,), 0.5)
    assert bool(dst.effective_threshold(weight, threshold, reset_ratio=2.5 / row).all())
    assert not dst.effective_threshold(weight, threshold, reset_ratio=3.5 / row).any()
