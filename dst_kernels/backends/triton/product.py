"""Compute x (W * M)^T + b and dX = dY (W * M), each in one pass over the weight as it is stored.

Both are computed transposed, out^T [R, M] = A [R, C] in^T [C, M], with the masked weight (A is
W * M, or its transpose for dX) as the left operand: on Hopper it then goes from registers straight
into wgmma, while as the right operand every masked tile would go back to shared memory first.

The forward pass multiplies before it knows whether the layer has collapsed, and counts what it
prunes. A second launch adds up the counts. If the layer has collapsed, it multiplies again without
a mask; otherwise it adds up the slabs of a split product, if there are any. So the weight is
usually read only once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, CompiledTile, cdiv, index_dtype, least_pruned, on_device_of
from .masking import ALONG_R, ELEMENT, LAYER, load_threshold, nan_of, operand
from .matrix import Matrix, Strided
from .pack import COUNTS, has_collapsed
from .tiles import MULTIPROCESSORS, ProductTile


class Guard(NamedTuple):
    """Hold what decides whether a layer has collapsed, and the thresholds to zero if it has."""

    pruned_counts: Tensor
    least_pruned: int
    effective: Tensor
    number_of_thresholds: int


@triton.jit
def tile_at(index, outer_tiles, inner_tiles, GROUP: tl.constexpr):
    """Return the (outer, inner) tile number `index`, in bands of GROUP outer tiles: in one band
    programs share L2."""
    band = GROUP * inner_tiles
    first = (index // band) * GROUP
    height = tl.minimum(outer_tiles - first, GROUP)
    return first + (index % band) % height, (index % band) // height


@triton.jit
def tile_of_program(outer_tiles, inner_tiles, GROUP: tl.constexpr):
    """Return this program's (outer, inner) tile."""
    return tile_at(tl.program_id(0), outer_tiles, inner_tiles, GROUP)


@triton.jit
def _accumulate(
    x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end,
    THRESHOLD: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return A in^T over columns begin to end, and how many weights it pruned, if they COUNT.

    Without a `threshold`, t = 0. Offsets inside a tile are int32 where they fit, to save registers.
    Weights are counted by a second product, of the mask of pruned ones with a tile of ones: a sum
    across threads in the loop would make the tensor cores wait.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_C: tl.constexpr = TILE.block_c
    INDEX: tl.constexpr = TILE.index
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    r = tile_r.to(tl.int64) * BLOCK_R + rows
    w_start = weight.start + tile_r.to(tl.int64) * BLOCK_R * weight.row
    w_start += tl.cast(begin, tl.int64) * weight.column
    w_step = tl.cast(weight.column, tl.int64) * BLOCK_C
    w_tile = rows.to(INDEX)[:, None] * weight.row + columns.to(INDEX)[None, :] * weight.column
    x_dtype: tl.constexpr = x.start.dtype.element_ty
    x_start = x.start + tile_m.to(tl.int64) * BLOCK_M * x.row
    x_start += tl.cast(begin, tl.int64) * x.column
    x_step = tl.cast(x.column, tl.int64) * BLOCK_C
    tokens = tl.arange(0, BLOCK_M).to(INDEX)
    x_tile = tokens[None, :] * x.row + columns.to(INDEX)[:, None] * x.column
    accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    pruned = tl.zeros((BLOCK_R, 16), tl.int32)
    ones = tl.full((BLOCK_C, 16), 1.0, x_dtype)
    of_rows = tl.zeros((BLOCK_R, 1), tl.float32)
    if threshold is not None and THRESHOLD == ALONG_R:
        of_rows = load_threshold(threshold, r, columns, in_r, in_r, ALONG_R, tl.float32)
    for start in tl.range(begin, end, BLOCK_C, loop_unroll_factor=TILE.unroll):
        c = start + columns
        in_c = c < end
        inside = in_r[:, None] & in_c[None, :]
        w = tl.load(w_start + w_tile, mask=inside, other=0.0).to(tl.float32)
        xt = tl.load(x_start + x_tile, mask=in_m[None, :] & in_c[:, None], other=0.0)
        if threshold is None or THRESHOLD == ALONG_R:
            t = of_rows
        else:
            t = load_threshold(threshold, r, c, in_r, in_c, THRESHOLD, tl.float32)
        left = operand(w, t, THRESHOLD).to(x_dtype)
        accumulator = tl.dot(left, xt, accumulator, input_precision=TILE.precision)
        if COUNT:
            small = tl.where(tl.abs(w) <= t, 1.0, 0.0).to(x_dtype)
            # A sum of its own: the next step may not write `small` while this product reads it.
            pruned += tl.dot(small, ones, input_precision="tf32").to(tl.int32)
        w_start += w_step
        x_start += x_step
    if threshold is not None and THRESHOLD != ELEMENT:
        accumulator += nan_of(threshold, of_rows, begin, end, THRESHOLD)
    count = 0
    if COUNT:
        # The same in all 16 columns. Zeros loaded beyond the last column count too, unless their
        # threshold is negative.
        of_padding = tl.zeros((BLOCK_R,), tl.int32) + tl.cdiv(end - begin, BLOCK_C) * BLOCK_C
        of_padding -= end - begin
        if THRESHOLD == ALONG_R:
            of_padding = tl.where(tl.reshape(of_rows, (BLOCK_R,)) >= 0, of_padding, 0)
        counted = tl.max(pruned, axis=1) - of_padding
        count = tl.sum(tl.where(in_r, counted, 0), axis=0)
    return accumulator, count


@triton.jit
def _indices(tile_r, tile_m, M, R, TILE: tl.constexpr):
    """Return a tile's rows r and tokens m, and which of them there are."""
    r = tile_r.to(tl.int64) * TILE.block_r + tl.arange(0, TILE.block_r)
    m = tile_m.to(tl.int64) * TILE.block_m + tl.arange(0, TILE.block_m)
    return r, m, r < R, m < M


@triton.jit
def _store(out, accumulator, bias, r, m, in_r, in_m, R):
    """Write out [M, R], contiguous, from its transpose."""
    if bias is not None:
        accumulator += tl.load(bias + r, mask=in_r, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + m[:, None] * R + r[None, :],
        tl.trans(accumulator.to(out.dtype.element_ty)),
        mask=in_m[:, None] & in_r[None, :],
    )


@triton.jit
def _multiply_unmasked(x, weight, bias, out, tile_r, tile_m, M, R, C, TILE: tl.constexpr):
    """Write a tile of out with t = 0."""
    r, m, in_r, in_m = _indices(tile_r, tile_m, M, R, TILE)
    accumulator, _ = _accumulate(
        x, weight, None, tile_r, tile_m, in_r, in_m, 0, C, LAYER, False, TILE
    )
    _store(out, accumulator, bias, r, m, in_r, in_m, R)


@triton.jit
def _add_slabs(slabs, bias, out, tile_r, tile_m, M, R, parts, TILE: tl.constexpr):
    """Write a tile of out, the sum of the slabs in order."""
    r, _, in_r, in_m = _indices(tile_r, tile_m, M, R, TILE)
    inside = in_m[:, None] & in_r[None, :]
    total = tl.full((TILE.block_m, TILE.block_r), 0.0, tl.float32)
    start = tile_m.to(tl.int64) * TILE.block_m * R + tile_r * TILE.block_r
    tokens = tl.arange(0, TILE.block_m).to(TILE.index)
    tile = tokens[:, None] * R + tl.arange(0, TILE.block_r)[None, :]
    for _ in range(parts):
        total += tl.load(slabs + start + tile, mask=inside, other=0.0)
        slabs += tl.cast(M, tl.int64) * R
    if bias is not None:
        total += tl.load(bias + r, mask=in_r, other=0.0).to(tl.float32)[None, :]
    tl.store(out + start + tile, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("M", "steps"))
def product_kernel(
    x, weight, threshold, bias, out, pruned_counts, effective, number_of_thresholds,
    M, sizes, steps, stride_x, stride_w, stride_t, THRESHOLD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out [M, R] over `steps` tiles of columns from program_id(1) * steps on.

    `sizes` are (R, C). With several parts, `out` is float32 slabs [parts, M, R] and gets no bias.
    `effective` [number_of_thresholds], if it is given, becomes a copy of thresholds along R.
    """
    R, C = sizes
    part = steps * TILE.block_c
    tiles_r = tl.cdiv(R, TILE.block_r)
    tile_r, tile_m = tile_of_program(tiles_r, tl.cdiv(M, TILE.block_m), TILE.group)
    r, m, in_r, in_m = _indices(tile_r, tile_m, M, R, TILE)
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, C)
    x, weight, threshold = (
        Strided(x, *stride_x), Strided(weight, *stride_w), Strided(threshold, *stride_t)
    )  # fmt: skip
    if pruned_counts is None:
        accumulator, _ = _accumulate(
            x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end, THRESHOLD, False, TILE
        )
    elif tile_m == 0:
        # All tiles over these rows would find the same count: one counts.
        accumulator, pruned = _accumulate(
            x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end, THRESHOLD, True, TILE
        )
        tl.store(pruned_counts + split * tiles_r + tile_r, pruned)
    else:
        accumulator, _ = _accumulate(
            x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end, THRESHOLD, False, TILE
        )
    slab = out + split.to(tl.int64) * M * R
    _store(slab, accumulator, bias, r, m, in_r, in_m, R)
    if effective is not None:
        one = in_r & (r < number_of_thresholds) & (tile_m == 0) & (split == 0)
        limit = tl.load(threshold.start + r * threshold.row, mask=one, other=0.0)
        tl.store(effective + r, limit, mask=one)


@triton.jit(do_not_specialize=("number_of_counts", "M", "parts"))
def finish_kernel(
    x, weight, slabs, bias, out, guard, number_of_counts, M, sizes, parts, TILE: tl.constexpr
):  # fmt: skip
    """Sum the slabs in order, or start over with t = 0 in a collapsed layer: the second launch.

    Nearly always there is little to do, so that no more programs start than run at once, and the
    launcher asks for no pipeline, which would need shared memory.
    """
    R, C = sizes
    tiles_r, tiles_m = tl.cdiv(R, TILE.block_r), tl.cdiv(M, TILE.block_m)
    collapsed = False
    if guard is not None:
        collapsed = has_collapsed(guard.pruned_counts, number_of_counts, guard.least_pruned)
        if collapsed:
            step = tl.num_programs(0) * COUNTS
            for start in range(tl.program_id(0) * COUNTS, guard.number_of_thresholds, step):
                i = start + tl.arange(0, COUNTS)
                zero = tl.zeros((COUNTS,), guard.effective.dtype.element_ty)
                tl.store(guard.effective + i, zero, mask=i < guard.number_of_thresholds)
    if collapsed or slabs is not None:
        for tile in range(tl.program_id(0), tiles_r * tiles_m, tl.num_programs(0)):
            tile_r, tile_m = tile_at(tile, tiles_r, tiles_m, TILE.group)
            if collapsed:
                _multiply_unmasked(x, weight, bias, out, tile_r, tile_m, M, R, C, TILE)
            elif slabs is not None:
                _add_slabs(slabs, bias, out, tile_r, tile_m, M, R, parts, TILE)


def masked_product(
    x: Tensor,
    weight: Matrix,
    threshold: Matrix,
    bias: Tensor | None,
    tile: ProductTile,
    precision: str,
    *,
    reset_ratio: float | None = None,
    effective: Tensor | None = None,
) -> Tensor:
    """Return x [M, C] times the masked weight [R, C], transposed: [M, R] in x's dtype.

    `effective` is dense memory for the thresholds that masked: with a `reset_ratio`, 0 if the layer
    has collapsed, else a copy of `threshold`, where that does not vary element by element.
    """
    M, R, C = x.shape[0], weight.rows, weight.columns
    # A single threshold is read as one for each row: a scalar in the loop serialises wgmma.
    axis = ALONG_R.value if threshold.axis == LAYER.value else threshold.axis
    steps = cdiv(cdiv(C, tile.split), tile.block_c)
    parts = cdiv(C, steps * tile.block_c)
    out = x.new_empty((M, R))
    slabs = x.new_empty((parts, M, R), dtype=torch.float32) if parts > 1 else None
    tiles_r = cdiv(R, tile.block_r)
    tiles = tiles_r * cdiv(M, tile.block_m)
    copied = None if threshold.axis == ELEMENT.value else effective
    number = 0 if effective is None else effective.numel()
    counts = guard = None
    if reset_ratio is not None and effective is not None:
        counts = x.new_empty(parts * tiles_r, dtype=torch.int32)
        guard = Guard(counts, least_pruned(R * C, reset_ratio), effective, number)
    index = index_dtype(
        tile.block_r * weight.row_stride, tile.block_c * weight.column_stride,
        tile.block_m * x.stride(0), tile.block_c * x.stride(1), tile.block_m * R,
    )  # fmt: skip
    compiled = CompiledTile(
        precision, index, tile.block_m, tile.block_r, tile.block_c, tile.group, unroll=tile.unroll,
    )  # fmt: skip
    options = {"num_warps": tile.warps, **OPTIONS}
    with on_device_of(x):
        product_kernel[(tiles, parts)](
            x, weight.tensor, threshold.tensor, bias if parts == 1 else None,
            out if slabs is None else slabs, counts, copied, number, M, (R, C), steps,
            x.stride(), weight.strided[1:], threshold.strided[1:], THRESHOLD=axis,
            TILE=compiled, num_stages=tile.stages, **options,
        )  # fmt: skip
        if guard is not None or parts > 1:
            finish_kernel[(min(tiles, MULTIPROCESSORS),)](
                Strided(x, *x.stride()), weight.strided, slabs, bias, out, guard, parts * tiles_r,
                M, (R, C), parts, TILE=compiled, num_stages=1, **options,
            )  # fmt: skip
    return out
