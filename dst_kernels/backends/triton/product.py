"""y = x (W * M)^T + b and dX = dY (W * M), each in one pass over the weight as it is stored.

Both are computed transposed, out^T [R, M] = A [R, C] in^T [C, M], with the masked weight (A is
W * M, or its transpose for dX) as the left operand: on Hopper it then goes from registers straight
into wgmma, while as the right operand every masked tile would go back to shared memory first.

The forward pass multiplies before it knows whether the collapse guard fires, and counts what it
prunes. A second launch adds up the counts; unless the layer has collapsed it only adds up the
slabs of a split product, or leaves at once. That spares reading the weight twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.weight import largest_collapsed_count
from .launch import OPTIONS, index_dtype, on_device_of
from .masking import ALONG_R, LAYER, load_threshold, masked, transposed_axis
from .matrix import Matrix
from .pack import has_collapsed
from .tiles import ProductTile

__all__ = ["finish_kernel", "masked_product", "product_kernel"]


@triton.jit
def tile_of_program(outer_tiles, inner_tiles, GROUP: tl.constexpr):
    """Program number -> (outer, inner) tile, in bands of GROUP outer tiles, which share L2."""
    program = tl.program_id(0)
    band = GROUP * inner_tiles
    first = (program // band) * GROUP
    height = tl.minimum(outer_tiles - first, GROUP)
    return first + (program % band) % height, (program % band) // height


@triton.jit
def _accumulate(
    x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end,
    stride_xm, stride_xc, stride_wr, stride_wc, stride_tr, stride_tc,
    THRESHOLD: tl.constexpr, COUNT: tl.constexpr, RESET: tl.constexpr, PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(A in^T over columns begin to end, weights it pruned); RESET: with t = 0.

    Offsets inside a tile are INDEX, int32 where they fit: registers are what is short. Weights are
    counted by a second product, of the pruned ones with a tile of ones: a sum across threads in
    the loop would make the tensor cores wait.
    """
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    r = tile_r.to(tl.int64) * BLOCK_R + rows
    w_start = weight + tile_r.to(tl.int64) * BLOCK_R * stride_wr
    x_start = x + tile_m.to(tl.int64) * BLOCK_M * stride_xm
    w_start += tl.cast(begin, tl.int64) * stride_wc
    x_start += tl.cast(begin, tl.int64) * stride_xc
    w_step = tl.cast(stride_wc, tl.int64) * BLOCK_C
    x_step = tl.cast(stride_xc, tl.int64) * BLOCK_C
    w_rows = rows.to(INDEX) * stride_wr
    w_columns = columns.to(INDEX) * stride_wc
    x_tile = (
        tl.arange(0, BLOCK_M).to(INDEX)[None, :] * stride_xm
        + columns.to(INDEX)[:, None] * stride_xc
    )
    accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    pruned = tl.zeros((BLOCK_R, 16), tl.float32)
    ones = tl.full((BLOCK_C, 16), 1.0, x.dtype.element_ty)
    for start in tl.range(begin, end, BLOCK_C, loop_unroll_factor=UNROLL):
        c = start + columns
        in_c = c < end
        # The tile as it lies in memory: [C, R] where the rows of A are contiguous.
        if TRANSPOSED:
            w_tile = w_columns[:, None] + w_rows[None, :]
            inside = in_c[:, None] & in_r[None, :]
        else:
            w_tile = w_rows[:, None] + w_columns[None, :]
            inside = in_r[:, None] & in_c[None, :]
        w = tl.load(w_start + w_tile, mask=inside, other=0.0).to(tl.float32)
        xt = tl.load(x_start + x_tile, mask=in_m[None, :] & in_c[:, None], other=0.0)
        if RESET:
            t = tl.zeros((), tl.float32)
        elif TRANSPOSED:
            t = load_threshold(
                threshold, c, r, in_c, in_r, stride_tc, stride_tr,
                transposed_axis(THRESHOLD), tl.float32,
            )  # fmt: skip
        else:
            t = load_threshold(
                threshold, r, c, in_r, in_c, stride_tr, stride_tc, THRESHOLD, tl.float32
            )  # fmt: skip
        left = masked(w, t).to(x.dtype.element_ty)
        if TRANSPOSED:
            left = tl.trans(left)
        accumulator = tl.dot(left, xt, accumulator, input_precision=PRECISION)
        if COUNT:
            small = tl.where(tl.abs(w) <= t, 1.0, 0.0).to(x.dtype.element_ty)
            if TRANSPOSED:
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
        limit = tl.load(threshold + r * stride_tr, mask=in_r, other=0.0)
        of_padding = tl.where(limit >= 0, of_padding, 0)
    of_rows = tl.where(in_r, of_rows - of_padding, 0)
    return accumulator, tl.sum(of_rows, axis=0)


@triton.jit
def _store(out, accumulator, bias, r, m, in_r, in_m, R, HAS_BIAS: tl.constexpr):
    """out [M, R], contiguous, from its transpose."""
    if HAS_BIAS:
        accumulator += tl.load(bias + r, mask=in_r, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + m[:, None] * R + r[None, :],
        tl.trans(accumulator.to(out.dtype.element_ty)),
        mask=in_m[:, None] & in_r[None, :],
    )


@triton.jit
def product_kernel(
    x, weight, threshold, bias, out, pruned_counts,
    M, R, C, part,
    stride_xm, stride_xc, stride_wr, stride_wc, stride_tr, stride_tc,
    THRESHOLD: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out [M, R], over columns program_id(1) * part onwards.

    With several parts, `out` is float32 slabs [parts, M, R] and gets no bias.
    """
    tiles_r = tl.cdiv(R, BLOCK_R)
    tile_r, tile_m = tile_of_program(tiles_r, tl.cdiv(M, BLOCK_M), GROUP)
    r = tile_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_r, in_m = r < R, m < M
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, C)
    accumulator, pruned = _accumulate(
        x, weight, threshold, tile_r, tile_m, in_r, in_m, begin, end,
        stride_xm, stride_xc, stride_wr, stride_wc, stride_tr, stride_tc,
        THRESHOLD, COUNT, False, PRECISION, TRANSPOSED, INDEX, BLOCK_M, BLOCK_R, BLOCK_C, UNROLL,
    )  # fmt: skip
    if COUNT:
        # All tiles over these rows count the same; one of them says it.
        where = pruned_counts + split * tiles_r + tile_r
        tl.store(where, pruned, mask=tile_m == 0)
    slab = out + split.to(tl.int64) * M * R
    _store(slab, accumulator, bias, r, m, in_r, in_m, R, HAS_BIAS)


@triton.jit
def finish_kernel(
    x, weight, slabs, bias, out, effective, pruned_counts,
    number_of_counts, least_pruned, number_of_thresholds, M, R, C, parts,
    stride_xm, stride_xc, stride_wr, stride_wc,
    GUARD: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, GROUP: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """The second launch: sum the slabs in order, or start over with t = 0 in a collapsed layer."""
    tile_r, tile_m = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M), GROUP)
    r = tile_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_r, in_m = r < R, m < M
    collapsed = False
    if GUARD:
        collapsed = has_collapsed(pruned_counts, number_of_counts, least_pruned, COUNTS)
    if collapsed:
        accumulator, _ = _accumulate(
            x, weight, weight, tile_r, tile_m, in_r, in_m, 0, C,
            stride_xm, stride_xc, stride_wr, stride_wc, 0, 0,
            ALONG_R, False, True, PRECISION, TRANSPOSED, INDEX, BLOCK_M, BLOCK_R, BLOCK_C, UNROLL,
        )  # fmt: skip
        _store(out, accumulator, bias, r, m, in_r, in_m, R, HAS_BIAS)
        step = tl.num_programs(0) * COUNTS
        for start in range(tl.program_id(0) * COUNTS, number_of_thresholds, step):
            i = start + tl.arange(0, COUNTS)
            zero = tl.zeros((COUNTS,), effective.dtype.element_ty)
            tl.store(effective + i, zero, mask=i < number_of_thresholds)
    elif SPLIT:
        accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        from_slab = slabs + m[None, :] * R + r[:, None]
        for _ in range(parts):
            accumulator += tl.load(from_slab, mask=in_m[None, :] & in_r[:, None], other=0.0)
            from_slab += tl.cast(M, tl.int64) * R
        _store(out, accumulator, bias, r, m, in_r, in_m, R, HAS_BIAS)


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
    """x [M, C] times the masked weight [R, C], transposed: [M, R] in x's dtype.

    With a `reset_ratio` the thresholds are taken as they are stored, and `effective`, a dense copy
    of them, is zeroed where the layer has collapsed.
    """
    M, R, C = x.shape[0], weight.rows, weight.columns
    guard = reset_ratio is not None
    # One threshold for all is read as one for each row: a scalar in the loop serialises wgmma.
    axis = ALONG_R.value if threshold.axis == LAYER.value else threshold.axis
    part = triton.cdiv(triton.cdiv(C, tile.split), tile.block_c) * tile.block_c
    parts = triton.cdiv(C, part)
    out = x.new_empty((M, R))
    slabs = x.new_empty((parts, M, R), dtype=torch.float32) if parts > 1 else out
    tiles_r = triton.cdiv(R, tile.block_r)
    tiles = tiles_r * triton.cdiv(M, tile.block_m)
    counts = slabs  # never touched without a guard
    if guard:
        counts = torch.empty(parts * tiles_r, dtype=torch.int32, device=x.device)
    has_bias = bias is not None
    bias = out if bias is None else bias
    constants = {
        "PRECISION": precision,
        "TRANSPOSED": weight.column_stride != 1,
        "INDEX": index_dtype(
            tile.block_r * weight.row_stride,
            tile.block_c * weight.column_stride,
            tile.block_m * x.stride(0),
            tile.block_c * x.stride(1),
        ),
        "BLOCK_M": tile.block_m,
        "BLOCK_R": tile.block_r,
        "BLOCK_C": tile.block_c,
        "UNROLL": tile.unroll,
        "GROUP": tile.group,
        "num_warps": tile.warps,
        **OPTIONS,
        "num_stages": tile.stages,
    }
    with on_device_of(x):
        product_kernel[(tiles, parts)](
            x, weight.tensor, threshold.tensor, bias, slabs, counts,
            M, R, C, part,
            *x.stride(), weight.row_stride, weight.column_stride,
            threshold.row_stride, threshold.column_stride,
            THRESHOLD=axis, COUNT=guard, HAS_BIAS=has_bias and parts == 1, **constants,
        )  # fmt: skip
        if guard or parts > 1:
            collapsed_count = largest_collapsed_count(R * C, reset_ratio) if guard else 0
            finish_kernel[(tiles,)](
                x, weight.tensor, slabs, bias, out, out if effective is None else effective,
                counts, counts.numel() if guard else 0, R * C - collapsed_count,
                effective.numel() if guard else 0, M, R, C, parts,
                *x.stride(), weight.row_stride, weight.column_stride,
                GUARD=guard, SPLIT=parts > 1, HAS_BIAS=has_bias, COUNTS=1024, **constants,
            )  # fmt: skip
    return out
