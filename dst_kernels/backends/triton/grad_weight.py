"""Compute dW and dt of a linear layer in one pass: G = dY^T X never leaves the accumulator.

Each program owns a tile of the weight, multiplies over all tokens, then reads W and t and writes dW
and, for each row, its share of dt; the shares are added up in a fixed order, without atomics. Where
the weight has too few tiles to fill the GPU, tokens are split: programs write slabs of G (partial
sums), and `post` adds them up and computes dW and dt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, CompiledTile, cdiv, index_dtype, on_device_of
from .masking import ELEMENT, SURROGATE_CODES, Rule, load_threshold, weight_gradients
from .matrix import Matrix, Strided
from .product import tile_of_program
from .tiles import GradWeightTile


@triton.jit
def _dense_tile(grad, x, tile_r, tile_c, in_r, in_c, begin, end, TILE: tl.constexpr):
    """Return G, summed over tokens begin to end."""
    INDEX: tl.constexpr = TILE.index
    tokens = tl.arange(0, TILE.block_m)
    first = tl.cast(begin, tl.int64)
    grad_start = grad.start + first * grad.row + tile_r.to(tl.int64) * TILE.block_r * grad.column
    x_start = x.start + first * x.row + tile_c.to(tl.int64) * TILE.block_c * x.column
    grad_step = tl.cast(grad.row, tl.int64) * TILE.block_m
    x_step = tl.cast(x.row, tl.int64) * TILE.block_m
    m = tokens.to(INDEX)[:, None]
    grad_tile = m * grad.row + tl.arange(0, TILE.block_r).to(INDEX)[None, :] * grad.column
    x_tile = m * x.row + tl.arange(0, TILE.block_c).to(INDEX)[None, :] * x.column
    accumulator = tl.full((TILE.block_r, TILE.block_c), 0.0, tl.float32)
    for start in range(begin, end, TILE.block_m):
        in_m = start + tokens < end
        left = tl.load(grad_start + grad_tile, mask=in_m[:, None] & in_r[None, :], other=0.0)
        right = tl.load(x_start + x_tile, mask=in_m[:, None] & in_c[None, :], other=0.0)
        accumulator = tl.dot(tl.trans(left), right, accumulator, input_precision=TILE.precision)
        grad_start += grad_step
        x_start += x_step
    return accumulator


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _elements(matrix, row, column, r, c):
    """Return pointers to elements (row + r, column + c); r and c are narrow integers."""
    start = matrix.start + row * matrix.row + column * matrix.column
    return start + r * matrix.row + c * matrix.column


@triton.jit
def _epilogue(
    dense, first, weight, threshold, grad_weight, grad_threshold, tile_r, C, in_r,
    RULE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write dW of the columns from `first` on, from G; return each row's sum of dt."""
    rows, columns = tl.arange(0, TILE.block_r), tl.arange(0, TILE.block_c // TILE.pieces)
    row = tile_r.to(tl.int64) * TILE.block_r
    in_c = first + columns < C
    inside = in_r[:, None] & in_c[None, :]
    r, c = rows.to(TILE.index)[:, None], columns.to(TILE.index)[None, :]
    w = tl.load(_elements(weight, row, first, r, c), mask=inside, other=0.0)
    t = load_threshold(threshold, row + rows, first + columns, in_r, in_c, RULE.axis, tl.float32)
    gw, gt = weight_gradients(dense, w.to(tl.float32), t, RULE)
    gw = gw.to(grad_weight.start.dtype.element_ty)
    tl.store(_elements(grad_weight, row, first, r, c), gw, mask=inside)
    if RULE.axis == ELEMENT:
        gt_stored = gt.to(grad_threshold.start.dtype.element_ty)
        tl.store(_elements(grad_threshold, row, first, r, c), gt_stored, mask=inside)
    return tl.sum(tl.where(inside, gt, 0.0), axis=1)


@triton.jit
def write_gradients(
    dense, weight, threshold, grad_weight, grad_threshold, tile_r, tile_c, C, in_r,
    RULE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write dW of a tile from its G, in pieces that fit in registers; return row sums of dt."""
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_C: tl.constexpr = TILE.block_c
    PIECES: tl.constexpr = TILE.pieces
    if PIECES == 1:
        pieces = (dense,)
    elif PIECES == 2:
        pieces = _halves(dense, BLOCK_R, BLOCK_C)
    else:
        left, right = _halves(dense, BLOCK_R, BLOCK_C)
        a, b = _halves(left, BLOCK_R, BLOCK_C // 2)
        c, d = _halves(right, BLOCK_R, BLOCK_C // 2)
        pieces = (a, b, c, d)  # type: ignore[assignment]  # Triton compiles one branch alone
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    for i in tl.static_range(PIECES):
        row_sum += _epilogue(
            pieces[i], tile_c.to(tl.int64) * BLOCK_C + i * (BLOCK_C // PIECES),
            weight, threshold, grad_weight, grad_threshold, tile_r, C, in_r, RULE, TILE,
        )  # fmt: skip
    return row_sum


@triton.jit(do_not_specialize=("M",))
def grad_weight_kernel(
    grad, x, weight, threshold, grad_weight, grad_threshold, M, R, C,
    RULE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dW [R, C].

    grad_threshold is the result where thresholds are element-wise, else partial sums
    [tiles of C, R].
    """
    tile_r, tile_c = tile_of_program(tl.cdiv(R, TILE.block_r), tl.cdiv(C, TILE.block_c), TILE.group)
    rows = tl.arange(0, TILE.block_r)
    in_r = tile_r * TILE.block_r + rows < R
    in_c = tile_c * TILE.block_c + tl.arange(0, TILE.block_c) < C
    accumulator = _dense_tile(grad, x, tile_r, tile_c, in_r, in_c, 0, M, TILE)
    row_sum = write_gradients(
        accumulator, weight, threshold, grad_weight, grad_threshold, tile_r, tile_c, C, in_r,
        RULE, TILE,
    )  # fmt: skip
    if RULE.axis != ELEMENT:
        r = tile_r.to(tl.int64) * TILE.block_r + rows
        tl.store(grad_threshold.start + tile_c.to(tl.int64) * R + r, row_sum, mask=in_r)


@triton.jit(do_not_specialize=("M", "steps"))
def slabs_kernel(grad, x, slabs, M, R, C, steps, TILE: tl.constexpr):
    """Compute a tile of a slab of G [parts, R, C]: `steps` tiles of tokens from step
    program_id(1) * steps on."""
    tile_r, tile_c = tile_of_program(tl.cdiv(R, TILE.block_r), tl.cdiv(C, TILE.block_c), TILE.group)
    r = tile_r.to(tl.int64) * TILE.block_r + tl.arange(0, TILE.block_r)
    c = tile_c * TILE.block_c + tl.arange(0, TILE.block_c)
    in_r, in_c = r < R, c < C
    split, part = tl.program_id(1), steps * TILE.block_m
    begin, end = split * part, tl.minimum((split + 1) * part, M)
    accumulator = _dense_tile(grad, x, tile_r, tile_c, in_r, in_c, begin, end, TILE)
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
    """Fill `grad_weight` from grad [M, R] and x [M, C]; fill or return dt as `post` does."""
    (M, R), C = grad.shape, x.shape[1]
    tiles_c = cdiv(C, tile.block_c)
    partial = None
    if grad_threshold is None:
        partial = torch.empty((tiles_c, R), dtype=torch.float32, device=x.device)
        grad_threshold = Matrix(partial, R, C, 0, 0)
    with on_device_of(x):
        grad_weight_kernel[(cdiv(R, tile.block_r) * tiles_c,)](
            Strided(grad, *grad.stride()), Strided(x, *x.stride()), weight.strided,
            threshold.strided, grad_weight.strided, grad_threshold.strided, M, R, C,
            RULE=Rule(threshold.axis, SURROGATE_CODES[surrogate], structure_gradient),
            TILE=compiled_tile(
                tile, precision, *_extents(grad, x, tile),
                tile.block_r * weight.row_stride, tile.block_c * weight.column_stride,
                tile.block_r * grad_weight.row_stride, tile.block_c * grad_weight.column_stride,
            ),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return partial


def dense_slabs(grad: Tensor, x: Tensor, tile: GradWeightTile, precision: str) -> Tensor:
    """Return G as float32 partial sums [parts, R, C] over the tokens."""
    (M, R), C = grad.shape, x.shape[1]
    # Without tokens there is one slab of zeros.
    steps = cdiv(max(cdiv(M, tile.split), 1), tile.block_m)
    parts = max(cdiv(M, steps * tile.block_m), 1)
    slabs = torch.empty((parts, R, C), dtype=torch.float32, device=x.device)
    tiles = cdiv(R, tile.block_r) * cdiv(C, tile.block_c)
    with on_device_of(x):
        slabs_kernel[(tiles, parts)](
            Strided(grad, *grad.stride()), Strided(x, *x.stride()), slabs, M, R, C, steps,
            TILE=compiled_tile(tile, precision, *_extents(grad, x, tile)),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return slabs


def compiled_tile(tile: GradWeightTile, precision: str, *extents: int) -> CompiledTile:
    """Return the kernel's TILE for tiles with these extents along their axes, in elements."""
    return CompiledTile(
        precision, index_dtype(*extents), tile.block_m, tile.block_r, tile.block_c, tile.group,
        pieces=tile.pieces,
    )  # fmt: skip


def _extents(grad: Tensor, x: Tensor, tile: GradWeightTile) -> tuple[int, ...]:
    """Return the extents of a tile of either operand along its axes, in elements of memory."""
    return (
        tile.block_m * grad.stride(0), tile.block_r * grad.stride(1),
        tile.block_m * x.stride(0), tile.block_c * x.stride(1),
    )  # fmt: skip
