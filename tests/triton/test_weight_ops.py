"""Effective threshold, pack and post against the reference: dtypes, shapes, the guard."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import (
    GRANULARITIES,
    SURROGATES,
    check,
    every_granularity,
    gradient_along,
    normal,
    run,
    same,
    thresholds,
)

from dst_kernels import reference
from dst_kernels.autograd import COMMITTED, MaskOptions, masked_weight
from dst_kernels.backends.triton import pack
from dst_kernels.backends.triton.tiles import StreamTile

pytestmark = pytest.mark.usefixtures("poisoned")

# Less than a block, a block, more than one of rows or of columns; one row, one column.
SHAPES = [(1, 1), (3, 1), (1, 130), (17, 63), (130, 65), (2, 4099)]
CONVOLUTIONS = [(6, 4, 3), (5, 3, 3, 2), (3, 2, 1, 2, 3), (4, 1, 1, 1), (1, 5, 7)]

F16, F32, F64 = torch.float16, torch.float32, torch.float64
# weight, threshold
DTYPES = [(F32, F32), (F16, F32), (F16, F16), (F32, F16), (F64, F64), (F32, F64), (F16, F64)]
every_dtype = pytest.mark.parametrize(("dtype", "of_threshold"), DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES + CONVOLUTIONS, ids=str)


@every_shape
def test_pack_of_all_shapes(shape, device):
    weight = normal(*shape, device=device)
    for granularity, ratio in itertools.product(GRANULARITIES, (None, 0.0, 1.0)):
        threshold = thresholds(shape, granularity, device=device)
        same(
            run("masked_weight", weight, threshold, ratio, F32),
            reference.masked_weight(weight, threshold, ratio, F32),
        )
        same(
            run("effective_threshold", weight, threshold, ratio),
            reference.effective_threshold(weight, threshold, ratio),
        )


@every_dtype
def test_pack_in_all_dtypes(dtype, of_threshold, device):
    weight = normal(17, 65, dtype=dtype, device=device)
    for granularity, out in itertools.product(GRANULARITIES, (F16, F32, F64)):
        threshold = thresholds((17, 65), granularity, dtype=of_threshold, device=device)
        expected = reference.masked_weight(weight, threshold, 0.01, out)
        packed, effective = run("masked_weight", weight, threshold, 0.01, out)
        same((packed, effective), expected)
        assert 0.2 < (packed == 0).double().mean() < 0.8, "some are pruned, some are kept"
        same(run("effective_threshold", weight, threshold, 0.01), expected[1])


@pytest.mark.gpu
@every_granularity
def test_pack_and_post_of_bfloat16(granularity, device):
    for dtype, out in ((F32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        weight = normal(33, 130, dtype=dtype, device=device)
        threshold = thresholds((33, 130), granularity, device=device)
        same(
            run("masked_weight", weight, threshold, 0.01, out),
            reference.masked_weight(weight, threshold, 0.01, out),
        )
        grad = gradient_along(weight, out)
        check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


def test_pack_to_bfloat16_of_numbers_that_need_no_rounding(device):
    weight = normal(17, 65, device=device).bfloat16().float()
    threshold = thresholds((17, 65), "row", device=device)
    for ratio in (None, 0.01, 1.0):
        same(
            run("masked_weight", weight, threshold, ratio, torch.bfloat16),
            reference.masked_weight(weight, threshold, ratio, torch.bfloat16),
        )


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 65), (2, 4099), (8, 3, 5)], ids=str)
def test_the_guard_counts_exactly(shape, device):
    """It fires at the ratio and not one weight above it."""
    weight = normal(*shape, device=device)
    for granularity in GRANULARITIES:
        threshold = thresholds(shape, granularity, device=device)
        kept = reference.threshold_mask(weight, threshold).sum().item()
        for counted in {kept - 1, kept, kept + 1} & set(range(weight.numel() + 1)):
            ratio, fires = counted / weight.numel(), counted >= kept
            (effective,) = run("effective_threshold", weight, threshold, ratio)
            same((effective,), torch.zeros_like(threshold) if fires else threshold)
            masked = reference.masked_weight(weight, effective, None, F16)[0]
            same(run("masked_weight", weight, threshold, ratio, F16), (masked, effective))


@pytest.mark.parametrize(
    ("shape", "tile"),
    [((1030, 40), StreamTile(128, 32, 4)), ((20, 40), StreamTile(1, 32, 4))],
    ids=["more counts than one block", "more row blocks than programs of the second launch"],
)
def test_the_guard_counts_over_blocks_and_programs(shape, tile, device, monkeypatch, fresh_plans):
    monkeypatch.setattr(pack, "pack_tile", lambda columns, column_stride: tile)
    monkeypatch.setattr(pack, "_GUARD_PROGRAMS", 3)
    weight = torch.full(shape, 0.25, device=device)
    weight[-1, -1] = -1.0
    threshold = torch.full(shape[:1], 0.5, device=device)
    same(run("effective_threshold", weight, threshold, 0.0), threshold)
    expected = (weight, torch.zeros_like(threshold))
    same(run("masked_weight", weight, threshold, 1 / weight.numel(), F32), expected)


@pytest.mark.parametrize("permuted", [False, True])
@every_granularity
def test_a_forward_in_training_writes_a_reset_where_it_finds_it(
    granularity, permuted, device, monkeypatch
):
    """In two launches, and only where the layer has collapsed: one count may make it so."""
    launched = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(pack, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("pack_kernel", "apply_guard_kernel"):
        monkeypatch.setattr(pack, name, Counted(name))
    weight = normal(6, 40, 3, device=device)
    weight = weight.transpose(1, 2) if permuted else weight  # a row is not one piece of memory
    before = thresholds(weight.shape, granularity, device=device)
    kept = reference.threshold_mask(weight, before).sum().item()
    for count in (kept - 1, kept):
        threshold = before.clone()
        version = threshold._version
        options = MaskOptions(reset_ratio=count / weight.numel(), backend="triton")
        launched.clear()
        packed, effective = masked_weight(weight, threshold, options, F32, COMMITTED)
        assert effective is threshold and threshold._version > version
        assert launched == ["pack_kernel", "apply_guard_kernel"]
        expected = before if count < kept else torch.zeros_like(before)
        same((threshold,), expected)
        same((packed,), reference.masked_weight(weight, expected, None, F32)[0])
    launched.clear()
    untouched = before.clone()
    masked_weight(weight, untouched, options, F32)
    same((untouched,), before)


@every_shape
def test_post_of_all_shapes(shape, device):
    weight = normal(*shape, device=device)
    for granularity in GRANULARITIES:
        threshold, grad = thresholds(shape, granularity, device=device), gradient_along(weight)
        check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


@every_dtype
def test_post_in_all_dtypes(dtype, of_threshold, device):
    shape = (17, 65)
    weight = normal(*shape, dtype=dtype, device=device)
    of_grads = (F16, F32, F64, *[torch.bfloat16] * (device.type == "cuda"))
    for of_grad, granularity in itertools.product(of_grads, GRANULARITIES):
        grad = gradient_along(weight, of_grad)
        threshold = thresholds(shape, granularity, dtype=of_threshold, device=device)
        check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_post_with_all_surrogates(surrogate, dtype, device):
    shape = (9, 40)
    for granularity, structure_gradient in itertools.product(GRANULARITIES, (True, False)):
        weight = normal(*shape, dtype=dtype, device=device)
        threshold = thresholds(shape, granularity, dtype=dtype, device=device)
        grad = gradient_along(weight, dtype)
        check("masked_weight_backward", grad, weight, threshold, surrogate, structure_gradient)
