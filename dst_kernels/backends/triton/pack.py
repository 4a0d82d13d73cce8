"""pack: effective threshold, mask, cast and kept counts in one streaming pass over the weight.

Two launches. The first masks with the thresholds as they are and counts what it prunes in each row.
The second adds up the counts, which decides about the collapse guard on the device; it leaves at
once unless the layer has collapsed, and then writes zero thresholds and the weight unmasked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...reference.weight import largest_collapsed_count
from .launch import OPTIONS, TRITON_DTYPES, on_device_of
from .masking import ALONG_R, LAYER, load_threshold, masked
from .matrix import Matrix, compute_dtype
from .tiles import StreamTile

__all__ = ["apply_guard_kernel", "pack", "pack_kernel"]


@triton.jit
def _store_threshold(
    effective, value, r, c, in_r, in_c, first, stride_er, stride_ec, THRESHOLD: tl.constexpr
):  # fmt: skip
    """Write a tile's thresholds; those of rows and layers by the programs that are `first`."""
    value = value.to(effective.dtype.element_ty)
    if THRESHOLD == LAYER:
        tl.store(effective, value, mask=first & (tl.program_id(0) == 0))
    elif THRESHOLD == ALONG_R:
        tl.store(effective + r * stride_er, tl.reshape(value, r.shape), mask=in_r & first)
    else:
        offsets = r[:, None] * stride_er + c[None, :] * stride_ec
        tl.store(effective + offsets, value, mask=in_r[:, None] & in_c[None, :])


@triton.jit
def pack_kernel(
    weight, threshold, packed, effective, pruned_counts,
    R, C, chunk,
    stride_wr, stride_wc, stride_tr, stride_tc, stride_pr, stride_pc, stride_er, stride_ec,
    THRESHOLD: tl.constexpr, COMPUTE: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), columns program_id(1) * chunk onwards; pruned_counts [chunks, R]."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_r = r < R
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, C)
    pruned = tl.zeros((ROWS,), tl.int32)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        in_c = c < end
        inside = in_r[:, None] & in_c[None, :]
        w = tl.load(
            weight + r[:, None] * stride_wr + c[None, :] * stride_wc, mask=inside, other=0.0
        ).to(COMPUTE)
        t = load_threshold(
            threshold, r, c, in_r, in_c, stride_tr, stride_tc, THRESHOLD, COMPUTE
        )  # fmt: skip
        pruned += tl.sum(((tl.abs(w) <= t) & inside).to(tl.int32), axis=1)
        if WRITE:
            tl.store(
                packed + r[:, None] * stride_pr + c[None, :] * stride_pc,
                masked(w, t).to(packed.dtype.element_ty),
                mask=inside,
            )
        _store_threshold(
            effective, t, r, c, in_r, in_c, start == 0, stride_er, stride_ec, THRESHOLD
        )
    tl.store(pruned_counts + tl.program_id(1).to(tl.int64) * R + r, pruned, mask=in_r)


@triton.jit
def has_collapsed(pruned_counts, number_of_counts, least_pruned, BLOCK: tl.constexpr):
    """Whether the layer's counts add up to at least `least_pruned`; integers, so exact."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, number_of_counts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(pruned_counts + i, mask=i < number_of_counts, other=0)
    return tl.sum(total, axis=0) >= least_pruned


@triton.jit
def apply_guard_kernel(
    weight, packed, effective, pruned_counts,
    number_of_counts, least_pruned, R, C,
    stride_wr, stride_wc, stride_pr, stride_pc, stride_er, stride_ec,
    THRESHOLD: tl.constexpr, COMPUTE: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Set the thresholds to 0 and keep the whole weight, if the layer has collapsed."""
    if has_collapsed(pruned_counts, number_of_counts, least_pruned, COUNTS):
        for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
            r = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
            in_r = r < R
            for start in range(0, C, BLOCK):
                c = start + tl.arange(0, BLOCK).to(tl.int64)
                in_c = c < C
                inside = in_r[:, None] & in_c[None, :]
                w = tl.load(
                    weight + r[:, None] * stride_wr + c[None, :] * stride_wc,
                    mask=inside, other=0.0,
                ).to(COMPUTE)  # fmt: skip
                if THRESHOLD == LAYER:
                    t = tl.zeros((), COMPUTE)
                elif THRESHOLD == ALONG_R:
                    t = tl.zeros((ROWS, 1), COMPUTE)
                else:
                    t = tl.zeros((ROWS, BLOCK), COMPUTE)
                if WRITE:
                    tl.store(
                        packed + r[:, None] * stride_pr + c[None, :] * stride_pc,
                        masked(w, t).to(packed.dtype.element_ty),
                        mask=inside,
                    )
                _store_threshold(
                    effective, t, r, c, in_r, in_c, start == 0, stride_er, stride_ec, THRESHOLD
                )


# Enough programs to fill any GPU; each adds up all counts, so more would only read more.
_GUARD_PROGRAMS = 264


def pack(
    weight: Matrix,
    threshold: Matrix,
    packed: Matrix | None,
    effective: Matrix,
    reset_ratio: float | None,
    tile: StreamTile,
) -> None:
    """Fill `packed` (unless None) with W * M and `effective` with the effective threshold."""
    R, C = weight.rows, weight.columns
    row_blocks = triton.cdiv(R, tile.rows)
    chunk, chunks = tile.chunk(row_blocks, C)
    counts = torch.empty(chunks * R, dtype=torch.int32, device=weight.tensor.device)
    target = weight if packed is None else packed  # never written to with WRITE off
    constants = {
        "THRESHOLD": threshold.axis,
        "COMPUTE": TRITON_DTYPES[compute_dtype(weight.tensor, threshold.tensor)],
        "WRITE": packed is not None,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }
    strides = (
        target.row_stride, target.column_stride, effective.row_stride, effective.column_stride,
    )  # fmt: skip
    with on_device_of(weight.tensor):
        pack_kernel[(row_blocks, chunks)](
            weight.tensor, threshold.tensor, target.tensor, effective.tensor, counts,
            R, C, chunk,
            weight.row_stride, weight.column_stride,
            threshold.row_stride, threshold.column_stride, *strides,
            **constants,
        )  # fmt: skip
        if reset_ratio is None:
            return
        least_pruned = R * C - largest_collapsed_count(R * C, reset_ratio)
        apply_guard_kernel[(min(row_blocks, _GUARD_PROGRAMS),)](
            weight.tensor, target.tensor, effective.tensor, counts,
            counts.numel(), least_pruned, R, C,
            weight.row_stride, weight.column_stride, *strides,
            COUNTS=1024, **constants,
        )  # fmt: skip
