"""dW and dt of a linear layer in one pass: G = dY^T X never leaves the accumulator.

Each program owns a tile of the weight, multiplies over all tokens, then reads W and t and writes dW
and, for each row, its share of dt; the shares are added up in a fixed order, without atomics. Where
the weight has too few tiles to fill the GPU, tokens are split: programs write slabs of G, and
`post`, which is not linear in the slabs but in their sum, takes it from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, index_dtype, on_device_of
from .masking import ELEMENT, SURROGATE_CODES, load_threshold, weight_gradients
from .matrix import Matrix
from .product import tile_of_program
from .tiles import GradWeightTile

__all__ = [
    "dense_slabs",
    "fused_grad_weight",
    "grad_weight_kernel",
    "slabs_kernel",
    "write_gradients",
]


@triton.jit
def _dense_tile(
    grad, x, tile_r, tile_c, in_r, in_c, begin, end,
    stride_gm, stride_gr, stride_xm, stride_xc,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """G over tokens begin to end."""
    tokens = tl.arange(0, BLOCK_M)
    first = tl.cast(begin, tl.int64)
    grad_start = grad + first * stride_gm + tile_r.to(tl.int64) * BLOCK_R * stride_gr
    x_start = x + first * stride_xm + tile_c.to(tl.int64) * BLOCK_C * stride_xc
    grad_step = tl.cast(stride_gm, tl.int64) * BLOCK_M
    x_step = tl.cast(stride_xm, tl.int64) * BLOCK_M
    grad_tile = (
        tokens.to(INDEX)[:, None] * stride_gm + tl.arange(0, BLOCK_R).to(INDEX)[None, :] * stride_gr
    )
    x_tile = (
        tokens.to(INDEX)[:, None] * stride_xm + tl.arange(0, BLOCK_C).to(INDEX)[None, :] * stride_xc
    )
    accumulator = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_M):
        in_m = start + tokens < end
        left = tl.load(grad_start + grad_tile, mask=in_m[:, None] & in_r[None, :], other=0.0)
        right = tl.load(x_start + x_tile, mask=in_m[:, None] & in_c[None, :], other=0.0)
        accumulator = tl.dot(tl.trans(left), right, accumulator, input_precision=PRECISION)
        grad_start += grad_step
        x_start += x_step
    return accumulator


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    dense, first, weight, threshold, grad_weight, grad_threshold, tile_r, C, in_r,
    stride_wr, stride_wc, stride_tr, stride_tc, stride_or, stride_oc, stride_hr, stride_hc,
    THRESHOLD: tl.constexpr, SURROGATE: tl.constexpr, STRUCTURE_GRADIENT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_R: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """dW of the columns `first` onwards, from G; returns each row's sum of dt."""
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, PIECE)
    row = tile_r.to(tl.int64) * BLOCK_R
    in_c = first + columns < C
    inside = in_r[:, None] & in_c[None, :]
    r, c = rows.to(INDEX)[:, None], columns.to(INDEX)[None, :]
    w_start = weight + row * stride_wr + first * stride_wc
    w = tl.load(w_start + r * stride_wr + c * stride_wc, mask=inside, other=0.0).to(tl.float32)
    t = load_threshold(
        threshold, row + rows, first + columns, in_r, in_c, stride_tr, stride_tc,
        THRESHOLD, tl.float32,
    )  # fmt: skip
    gw, gt = weight_gradients(dense, w, t, SURROGATE, STRUCTURE_GRADIENT)
    out_start = grad_weight + row * stride_or + first * stride_oc
    gw = gw.to(grad_weight.dtype.element_ty)
    tl.store(out_start + r * stride_or + c * stride_oc, gw, mask=inside)
    if THRESHOLD == ELEMENT:
        into = grad_threshold + row * stride_hr + first * stride_hc
        gt_stored = gt.to(grad_threshold.dtype.element_ty)
        tl.store(into + r * stride_hr + c * stride_hc, gt_stored, mask=inside)
    return tl.sum(tl.where(inside, gt, 0.0), axis=1)


@triton.jit
def write_gradients(
    dense, weight, threshold, grad_weight, grad_threshold, tile_r, tile_c, C, in_r,
    stride_wr, stride_wc, stride_tr, stride_tc, stride_or, stride_oc, stride_hr, stride_hc,
    THRESHOLD: tl.constexpr, SURROGATE: tl.constexpr, STRUCTURE_GRADIENT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """dW of a tile from its G, in PIECES, so that each fits in registers; each row's sum of dt."""
    PIECE: tl.constexpr = BLOCK_C // PIECES
    if PIECES == 1:
        pieces = (dense,)
    elif PIECES == 2:
        pieces = _halves(dense, BLOCK_R, BLOCK_C)
    else:
        left, right = _halves(dense, BLOCK_R, BLOCK_C)
        a, b = _halves(left, BLOCK_R, BLOCK_C // 2)
        c, d = _halves(right, BLOCK_R, BLOCK_C // 2)
        pieces = (a, b, c, d)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    for i in tl.static_range(PIECES):
        row_sum += _epilogue(
            pieces[i], tile_c.to(tl.int64) * BLOCK_C + i * PIECE,
            weight, threshold, grad_weight, grad_threshold, tile_r, C, in_r,
            stride_wr, stride_wc, stride_tr, stride_tc,
            stride_or, stride_oc, stride_hr, stride_hc,
            THRESHOLD, SURROGATE, STRUCTURE_GRADIENT, INDEX, BLOCK_R, PIECE,
        )  # fmt: skip
    return row_sum


@triton.jit
def grad_weight_kernel(
    grad, x, weight, threshold, grad_weight, grad_threshold,
    M, R, C,
    stride_gm, stride_gr, stride_xm, stride_xc, stride_wr, stride_wc, stride_tr, stride_tc,
    stride_or, stride_oc, stride_hr, stride_hc,
    THRESHOLD: tl.constexpr, SURROGATE: tl.constexpr, STRUCTURE_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One tile of dW [R, C].

    grad_threshold is the result where thresholds are element-wise, else partial sums
    [tiles of C, R].
    """
    tile_r, tile_c = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C), GROUP)
    rows = tl.arange(0, BLOCK_R)
    in_r = tile_r * BLOCK_R + rows < R
    in_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C) < C
    accumulator = _dense_tile(
        grad, x, tile_r, tile_c, in_r, in_c, 0, M, stride_gm, stride_gr, stride_xm, stride_xc,
        PRECISION, INDEX, BLOCK_R, BLOCK_C, BLOCK_M,
    )  # fmt: skip
    row_sum = write_gradients(
        accumulator, weight, threshold, grad_weight, grad_threshold, tile_r, tile_c, C, in_r,
        stride_wr, stride_wc, stride_tr, stride_tc, stride_or, stride_oc, stride_hr, stride_hc,
        THRESHOLD, SURROGATE, STRUCTURE_GRADIENT, INDEX, BLOCK_R, BLOCK_C, PIECES,
    )  # fmt: skip
    if THRESHOLD != ELEMENT:
        r = tile_r.to(tl.int64) * BLOCK_R + rows
        tl.store(grad_threshold + tile_c.to(tl.int64) * R + r, row_sum, mask=in_r)


@triton.jit
def slabs_kernel(
    grad, x, slabs, M, R, C, part,
    stride_gm, stride_gr, stride_xm, stride_xc,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one slab [parts, R, C] of G: the tokens program_id(1) * part onwards."""
    tile_r, tile_c = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C), GROUP)
    r = tile_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_r, in_c = r < R, c < C
    split = tl.program_id(1)
    accumulator = _dense_tile(
        grad, x, tile_r, tile_c, in_r, in_c, split * part, tl.minimum((split + 1) * part, M),
        stride_gm, stride_gr, stride_xm, stride_xc, PRECISION, INDEX, BLOCK_R, BLOCK_C, BLOCK_M,
    )  # fmt: skip
    slab = slabs + split.to(tl.int64) * R * C
    inside = in_r[:, None] & in_c[None, :]
    tl.store(slab + r[:, None] * C + c[None, :], accumulator, mask=inside)


def fused_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Matrix,
    threshold: Matrix,
    grad_weight: Matrix,
    grad_threshold: Matrix | None,
    surrogate: str,
    structure_gradient: bool,
    tile: GradWeightTile,
    precision: str,
) -> Tensor | None:
    """Fill `grad_weight` from grad [M, R] and x [M, C]; of dt as `post` does."""
    (M, R), C = grad.shape, x.shape[1]
    tiles_c = triton.cdiv(C, tile.block_c)
    partial = None
    if grad_threshold is None:
        partial = torch.empty((tiles_c, R), dtype=torch.float32, device=x.device)
        grad_threshold = Matrix(partial, R, C, 0, 0)
    with on_device_of(x):
        grad_weight_kernel[(triton.cdiv(R, tile.block_r) * tiles_c,)](
            grad, x, weight.tensor, threshold.tensor, grad_weight.tensor, grad_threshold.tensor,
            M, R, C,
            *grad.stride(), *x.stride(), weight.row_stride, weight.column_stride,
            threshold.row_stride, threshold.column_stride,
            grad_weight.row_stride, grad_weight.column_stride,
            grad_threshold.row_stride, grad_threshold.column_stride,
            THRESHOLD=threshold.axis, SURROGATE=SURROGATE_CODES[surrogate],
            STRUCTURE_GRADIENT=structure_gradient, PRECISION=precision,
            INDEX=index_dtype(
                *_extents(grad, x, tile),
                tile.block_r * weight.row_stride, tile.block_c * weight.column_stride,
                tile.block_r * grad_weight.row_stride, tile.block_c * grad_weight.column_stride,
            ),
            BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, BLOCK_M=tile.block_m,
            GROUP=tile.group, PIECES=tile.pieces,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return partial


def dense_slabs(grad: Tensor, x: Tensor, tile: GradWeightTile, precision: str) -> Tensor:
    """G as float32 partial sums [parts, R, C] over the tokens."""
    (M, R), C = grad.shape, x.shape[1]
    # Without any, one slab of zeros.
    part = triton.cdiv(max(triton.cdiv(M, tile.split), 1), tile.block_m) * tile.block_m
    parts = max(triton.cdiv(M, part), 1)
    slabs = torch.empty((parts, R, C), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(R, tile.block_r) * triton.cdiv(C, tile.block_c)
    with on_device_of(x):
        slabs_kernel[(tiles, parts)](
            grad, x, slabs, M, R, C, part, *grad.stride(), *x.stride(),
            PRECISION=precision, INDEX=index_dtype(*_extents(grad, x, tile)),
            BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, BLOCK_M=tile.block_m, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return slabs


def _extents(grad: Tensor, x: Tensor, tile: GradWeightTile) -> tuple[int, ...]:
    """How far a tile of either operand reaches along its axes, in elements."""
    return (
        tile.block_m * grad.stride(0), tile.block_r * grad.stride(1),
        tile.block_m * x.stride(0), tile.block_c * x.stride(1),
    )  # fmt: skip
