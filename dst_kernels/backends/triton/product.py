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
from .masking import ALONG_R, LAYER, load_threshold, masked, transposed_axis
from .matrix import Matrix, Strided
from .pack import COUNTS, has_collapsed
from .tiles import ProductTile


class Sizes(NamedTuple):
    """Hold the sizes of a product; its sum over C is split into parts of `part`."""

    M: int
    R: int
    C: int
    part: int


class Guard(NamedTuple):
    """Hold what decides whether a layer has collapsed, and the thresholds to zero if it has."""

    pruned_counts: Tensor
    number_of_counts: int
    least_pruned: int
    effective: Tensor
    number_of_thresholds: int


@triton.jit
def tile_of_program(outer_tiles, inner_tiles, GROUP: tl.constexpr):
    """Return a program's (outer, inner) tile, in bands of GROUP outer tiles, which share L2."""
    program = tl.program_id(0)
    band = GROUP * inner_tiles
    first = (program // band) * GROUP
    height = tl.minimum(outer_tiles - first, GROUP)
    return first + (program % band) % height, (program % band) // height


@triton.jit
def _accumulate(
    x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end,
    THRESHOLD: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return A in^T over columns begin to end, and how many weights it pruned.

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
    x_start = x.start + tile_m.to(tl.int64) * BLOCK_M * x.row
    w_start += tl.cast(begin, tl.int64) * weight.column
    x_start += tl.cast(begin, tl.int64) * x.column
    w_step = tl.cast(weight.column, tl.int64) * BLOCK_C
    x_step = tl.cast(x.column, tl.int64) * BLOCK_C
    w_rows = rows.to(INDEX) * weight.row
    w_columns = columns.to(INDEX) * weight.column
    tokens = tl.arange(0, BLOCK_M).to(INDEX)
    x_tile = tokens[None, :] * x.row + columns.to(INDEX)[:, None] * x.column
    accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    pruned = tl.zeros((BLOCK_R, 16), tl.float32)
    x_dtype: tl.constexpr = x.start.dtype.element_ty
    ones = tl.full((BLOCK_C, 16), 1.0, x_dtype)
    for start in tl.range(begin, end, BLOCK_C, loop_unroll_factor=TILE.unroll):
        c = start + columns
        in_c = c < end
        # Load the tile in memory order: [C, R] where neighbouring rows of A are adjacent.
        if TILE.transposed:
            w_tile = w_columns[:, None] + w_rows[None, :]
            inside = in_c[:, None] & in_r[None, :]
        else:
            w_tile = w_rows[:, None] + w_columns[None, :]
            inside = in_r[:, None] & in_c[None, :]
        w = tl.load(w_start + w_tile, mask=inside, other=0.0).to(tl.float32)
        xt = tl.load(x_start + x_tile, mask=in_m[None, :] & in_c[:, None], other=0.0)
        if threshold is None:
            t = tl.zeros((), tl.float32)
        elif TILE.transposed:
            stored = Strided(threshold.start, threshold.column, threshold.row)
            t = load_threshold(stored, c, r, in_c, in_r, transposed_axis(THRESHOLD), tl.float32)
        else:
            t = load_threshold(threshold, r, c, in_r, in_c, THRESHOLD, tl.float32)
        left = masked(w, t).to(x_dtype)
        if TILE.transposed:
            left = tl.trans(left)
        accumulator = tl.dot(left, xt, accumulator, input_precision=TILE.precision)
        if COUNT:
            small = tl.where(tl.abs(w) <= t, 1.0, 0.0).to(x_dtype)
            if TILE.transposed:
                small = tl.trans(small)
            pruned = tl.dot(small, ones, pruned, input_precision="tf32")
        w_start += w_step
        x_start += x_step
    # Exact: whole numbers up to 2^24 in each row, the same in all 16 columns. Zeros loaded beyond
    # the last column count too, unless their threshold is negative.
    of_rows = tl.max(pruned, axis=1).to(tl.int32)
    padding = tl.cdiv(end - begin, BLOCK_C) * BLOCK_C - (end - begin)
    of_padding = tl.zeros((BLOCK_R,), tl.int32) + padding
    if COUNT and THRESHOLD == ALONG_R:
        limit = tl.load(threshold.start + r * threshold.row, mask=in_r, other=0.0)
        of_padding = tl.where(limit >= 0, of_padding, 0)
    of_rows = tl.where(in_r, of_rows - of_padding, 0)
    return accumulator, tl.sum(of_rows, axis=0)


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
def product_kernel(
    x, weight, threshold, bias, out, pruned_counts, sizes, stride_x, stride_w, stride_t,
    THRESHOLD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out [M, R], over `part` columns from program_id(1) * part on.

    With several parts, `out` is float32 slabs [parts, M, R] and gets no bias.
    """
    M, R, C, part = sizes
    tiles_r = tl.cdiv(R, TILE.block_r)
    tile_r, tile_m = tile_of_program(tiles_r, tl.cdiv(M, TILE.block_m), TILE.group)
    r = tile_r.to(tl.int64) * TILE.block_r + tl.arange(0, TILE.block_r)
    m = tile_m.to(tl.int64) * TILE.block_m + tl.arange(0, TILE.block_m)
    in_r, in_m = r < R, m < M
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, C)
    accumulator, pruned = _accumulate(
        Strided(x, *stride_x), Strided(weight, *stride_w), Strided(threshold, *stride_t),
        tile_r, tile_m, in_r, in_m, begin, end, THRESHOLD, pruned_counts is not None, TILE,
    )  # fmt: skip
    if pruned_counts is not None:
        # All tiles over these rows find the same count; one of them writes it.
        where = pruned_counts + split * tiles_r + tile_r
        tl.store(where, pruned, mask=tile_m == 0)
    slab = out + split.to(tl.int64) * M * R
    _store(slab, accumulator, bias, r, m, in_r, in_m, R)


@triton.jit
def finish_kernel(
    x, weight, slabs, bias, out, guard, M, R, C, parts, TILE: tl.constexpr
):  # fmt: skip
    """Sum the slabs in order, or start over with t = 0 in a collapsed layer: the second launch."""
    tile_r, tile_m = tile_of_program(tl.cdiv(R, TILE.block_r), tl.cdiv(M, TILE.block_m), TILE.group)
    r = tile_r.to(tl.int64) * TILE.block_r + tl.arange(0, TILE.block_r)
    m = tile_m.to(tl.int64) * TILE.block_m + tl.arange(0, TILE.block_m)
    in_r, in_m = r < R, m < M
    if guard is not None and has_collapsed(
        guard.pruned_counts, guard.number_of_counts, guard.least_pruned
    ):
        accumulator, _ = _accumulate(
            x, weight, None, tile_r, tile_m, in_r, in_m, 0, C, ALONG_R, False, TILE
        )
        _store(out, accumulator, bias, r, m, in_r, in_m, R)
        step = tl.num_programs(0) * COUNTS
        for start in range(tl.program_id(0) * COUNTS, guard.number_of_thresholds, step):
            i = start + tl.arange(0, COUNTS)
            zero = tl.zeros((COUNTS,), guard.effective.dtype.element_ty)
            tl.store(guard.effective + i, zero, mask=i < guard.number_of_thresholds)
    elif slabs is not None:
        accumulator = tl.full((TILE.block_r, TILE.block_m), 0.0, tl.float32)
        from_slab = slabs + m[None, :] * R + r[:, None]
        for _ in range(parts):
            accumulator += tl.load(from_slab, mask=in_m[None, :] & in_r[:, None], other=0.0)
            from_slab += tl.cast(M, tl.int64) * R
        _store(out, accumulator, bias, r, m, in_r, in_m, R)


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

    With a `reset_ratio` the thresholds are the stored ones, and `effective`, a dense copy of them,
    is set to 0 if the layer has collapsed.
    """
    M, R, C = x.shape[0], weight.rows, weight.columns
    # A single threshold is read as one for each row: a scalar in the loop serialises wgmma.
    axis = ALONG_R.value if threshold.axis == LAYER.value else threshold.axis
    part = cdiv(cdiv(C, tile.split), tile.block_c) * tile.block_c
    parts = cdiv(C, part)
    out = x.new_empty((M, R))
    slabs = x.new_empty((parts, M, R), dtype=torch.float32) if parts > 1 else None
    tiles_r = cdiv(R, tile.block_r)
    tiles = tiles_r * cdiv(M, tile.block_m)
    counts = guard = None
    if reset_ratio is not None and effective is not None:
        counts = x.new_empty(parts * tiles_r, dtype=torch.int32)
        least = least_pruned(R * C, reset_ratio)
        guard = Guard(counts, parts * tiles_r, least, effective, effective.numel())
    index = index_dtype(
        tile.block_r * weight.row_stride, tile.block_c * weight.column_stride,
        tile.block_m * x.stride(0), tile.block_c * x.stride(1),
    )  # fmt: skip
    constants = {
        "TILE": CompiledTile(
            precision, index, tile.block_m, tile.block_r, tile.block_c, tile.group,
            unroll=tile.unroll, transposed=weight.column_stride != 1,
        ),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }  # fmt: skip
    with on_device_of(x):
        product_kernel[(tiles, parts)](
            x, weight.tensor, threshold.tensor, bias if parts == 1 else None,
            out if slabs is None else slabs, counts, Sizes(M, R, C, part),
            x.stride(), weight.strided[1:], threshold.strided[1:], THRESHOLD=axis, **constants,
        )  # fmt: skip
        if guard is not None or parts > 1:
            operands = Strided(x, *x.stride()), weight.strided
            finish_kernel[(tiles,)](*operands, slabs, bias, out, guard, M, R, C, parts, **constants)
    return out
