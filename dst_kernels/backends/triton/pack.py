"""Make effective threshold, mask, cast and counts in one streaming pass over the weight: `pack`.

There are two launches. The first masks with the stored thresholds and counts what each program
prunes. The second adds up the counts, so that the device decides about the collapse guard. Only if
the layer has collapsed does it go on, and writes zero thresholds and the unmasked weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, TRITON_DTYPES, cdiv, least_pruned, on_device_of
from .masking import ALONG_R, ELEMENT, LAYER, elements, load_threshold, masked
from .matrix import Strided, compute_dtype, matrix_strides, threshold_strides
from .tiles import StreamTile, pack_tile

COUNTS = tl.constexpr(1024)
"""The number of counts that are added up at a time."""
PACK_COUNTS = tl.constexpr(4096)
"""The same for a pack, which has more of them."""


@triton.jit
def _store_threshold(effective, value, r, c, in_r, in_c, first, THRESHOLD: tl.constexpr):
    """Write a tile's thresholds; for rows and layers, only if the program is the `first`."""
    start = effective.start
    value = value.to(start.dtype.element_ty)
    if THRESHOLD == LAYER:
        tl.store(start, value, mask=first & (tl.program_id(0) == 0))
    elif THRESHOLD == ALONG_R:
        tl.store(start + r * effective.row, tl.reshape(value, r.shape), mask=in_r & first)
    else:
        tl.store(elements(effective, r, c), value, mask=in_r[:, None] & in_c[None, :])


@triton.jit
def pack_kernel(
    weight, threshold, packed, effective, pruned_counts, R, C, chunk,
    THRESHOLD: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mask ROWS rows, block program_id(0), and `chunk` columns from program_id(1) * chunk on.

    The program's count goes to pruned_counts [chunks, row blocks]. Without `packed` no weight is
    written.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_r = r < R
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, C)
    pruned = tl.zeros((ROWS,), tl.int32)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        in_c = c < end
        inside = in_r[:, None] & in_c[None, :]
        w = tl.load(elements(weight, r, c), mask=inside, other=0.0).to(COMPUTE)
        t = load_threshold(threshold, r, c, in_r, in_c, THRESHOLD, COMPUTE)
        pruned += tl.sum(((tl.abs(w) <= t) & inside).to(tl.int32), axis=1)
        if packed is not None:
            dtype = packed.start.dtype.element_ty
            tl.store(elements(packed, r, c), masked(w, t).to(dtype), mask=inside)
        _store_threshold(effective, t, r, c, in_r, in_c, start == 0, THRESHOLD)
    where = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pruned_counts + where, tl.sum(pruned, axis=0))


@triton.jit
def has_collapsed(pruned_counts, number_of_counts, least_pruned, AT_ONCE: tl.constexpr = COUNTS):
    """Return whether the layer's counts add up to at least `least_pruned`; exact, as integers."""
    total = tl.zeros((AT_ONCE,), tl.int64)
    for start in range(0, number_of_counts, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        total += tl.load(pruned_counts + i, mask=i < number_of_counts, other=0)
    return tl.sum(total, axis=0) >= least_pruned


@triton.jit
def apply_guard_kernel(
    weight, stored, packed, effective, pruned_counts, number_of_counts, least_pruned, R, C,
    THRESHOLD: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the thresholds to 0 and keep the whole weight, if the layer has collapsed.

    The thresholds are the effective ones and, unless None, the `stored` ones.
    """
    if has_collapsed(pruned_counts, number_of_counts, least_pruned, PACK_COUNTS):
        for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
            r = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
            in_r = r < R
            for start in range(0, C, BLOCK):
                c = start + tl.arange(0, BLOCK).to(tl.int64)
                in_c = c < C
                inside = in_r[:, None] & in_c[None, :]
                w = tl.load(elements(weight, r, c), mask=inside, other=0.0).to(COMPUTE)
                if THRESHOLD == LAYER:
                    t = tl.zeros((), COMPUTE)
                elif THRESHOLD == ALONG_R:
                    t = tl.zeros((ROWS, 1), COMPUTE)
                else:
                    t = tl.zeros((ROWS, BLOCK), COMPUTE)
                if packed is not None:
                    dtype = packed.start.dtype.element_ty
                    tl.store(elements(packed, r, c), masked(w, t).to(dtype), mask=inside)
                _store_threshold(effective, t, r, c, in_r, in_c, start == 0, THRESHOLD)
                if stored is not None:
                    _store_threshold(stored, t, r, c, in_r, in_c, start == 0, THRESHOLD)


# Enough programs to fill any GPU; each adds up all counts, so more would only read more.
_GUARD_PROGRAMS = 264


class PackPlan(NamedTuple):
    """Say how `pack` runs: the same for all tensors of one layout, so that it is kept.

    `strides` are those of rows and columns, of weight, threshold, packed and effective. Without a
    collapse guard `least_pruned` is None.
    """

    tile: StreamTile
    axis: int
    rows: int
    columns: int
    chunk: int
    number_of_counts: int
    least_pruned: int | None
    strides: Sequence[Sequence[int]]
    grid: tuple[int, int]
    guard_grid: tuple[int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def pack_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    weight: tuple[int, ...],
    threshold_shape: torch.Size,
    threshold_dtype: torch.dtype,
    threshold: tuple[int, ...],
    packed: tuple[int, ...],
    effective: tuple[int, ...],
    reset_ratio: float | None,
    tile: StreamTile | None = None,
) -> PackPlan | None:
    """Return how to mask a weight of this layout; None where a row is not one piece of memory.

    `weight`, `threshold`, `packed` and `effective` are strides. Without a `tile` it is the default.
    """
    R, C, axis = shape[0], math.prod(shape[1:]), ELEMENT.value
    if threshold_shape == shape:
        strides = matrix_strides(shape, weight, threshold, packed, effective)
    else:
        strides = matrix_strides(shape, weight, packed)
        if strides is not None:
            *stored, axis = threshold_strides(R, threshold_shape, threshold)
            *written, _ = threshold_strides(R, threshold_shape, effective)
            strides = strides[0], stored, strides[1], written
    if strides is None:
        return None
    tile = tile or pack_tile(C, strides[0][1])
    row_blocks = cdiv(R, tile.rows)
    chunk, chunks = tile.chunk(row_blocks, C)
    constants = {
        "THRESHOLD": axis,
        "COMPUTE": TRITON_DTYPES[compute_dtype(dtype, threshold_dtype)],
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }
    return PackPlan(
        tile, axis, R, C, chunk, chunks * row_blocks,
        None if reset_ratio is None else least_pruned(R * C, reset_ratio),
        strides, (row_blocks, chunks), (min(row_blocks, _GUARD_PROGRAMS),), constants,
    )  # fmt: skip


def pack(
    weight: Tensor,
    threshold: Tensor,
    packed: Tensor | None,
    effective: Tensor,
    commit: bool,
    plan: PackPlan,
) -> None:
    """Fill `packed` (unless None) with W * M and `effective` with the effective threshold.

    `commit`: a reset by the guard is also written into `threshold`.
    """
    _, _, R, C, chunk, number_of_counts, least, strides, grid, guard_grid, constants = plan
    counts = weight.new_empty(number_of_counts, dtype=torch.int32)
    w, t = Strided(weight, *strides[0]), Strided(threshold, *strides[1])
    p = None if packed is None else Strided(packed, *strides[2])
    e = Strided(effective, *strides[3])
    with on_device_of(weight):
        pack_kernel[grid](w, t, p, e, counts, R, C, chunk, **constants)
        if least is not None:
            apply_guard_kernel[guard_grid](
                w, t if commit else None, p, e, counts, number_of_counts, least, R, C, **constants
            )
