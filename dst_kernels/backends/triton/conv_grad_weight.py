"""dW and dt of a convolution in one pass: G never leaves the accumulator.

As `grad_weight.py`, whose epilogue this is: a program owns filters x channels of one tap, and the
sum goes over positions of the output, beside which the input is gathered as the tap sees it. A
weight has few tiles and an image many positions, so that these are split more often than not:
programs then write slabs of G in the weight's own layout, and `post` takes it from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_product import Lattice, locate, reach
from .grad_weight import write_gradients
from .launch import OPTIONS, index_dtype, on_device_of
from .masking import ALONG_R, ELEMENT, SURROGATE_CODES
from .product import tile_of_program
from .tiles import GradWeightTile

__all__ = [
    "conv_grad_weight",
    "conv_grad_weight_kernel",
    "conv_slabs",
    "conv_slabs_kernel",
]


@triton.jit
def _dense_tile(
    grad, x, tile_r, tile_c, in_r, in_c, kh, kw, begin, end, in_h, in_w, out_h, out_w,
    scale_h, scale_w, origin_h, origin_w, step_h, step_w,
    stride_gn, stride_gr, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """G of tap (kh, kw) over positions begin to end."""
    rows = tl.arange(0, BLOCK_R).to(INDEX) * stride_gr
    columns = tl.arange(0, BLOCK_C).to(INDEX) * stride_xc
    grad_start = grad + tile_r.to(tl.int64) * BLOCK_R * stride_gr
    x_start = x + tile_c.to(tl.int64) * BLOCK_C * stride_xc
    shift_h, shift_w = origin_h + kh * step_h, origin_w + kw * step_w
    accumulator = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_M):
        in_m = tl.arange(0, BLOCK_M) < end - start
        image, n, u_h, u_w = locate(tl.cast(start, tl.int64), out_h, out_w, BLOCK_M)
        of_grad = n.to(INDEX) * stride_gn + u_h.to(INDEX) * stride_gh + u_w.to(INDEX) * stride_gw
        left = tl.load(
            grad_start + image * stride_gn + (of_grad[:, None] + rows[None, :]),
            mask=in_m[:, None] & in_r[None, :],
            other=0.0,
        )
        h, w = u_h * scale_h + shift_h, u_w * scale_w + shift_w
        in_x = in_m & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
        of_x = n.to(INDEX) * stride_xn + h.to(INDEX) * stride_xh + w.to(INDEX) * stride_xw
        right = tl.load(
            x_start + image * stride_xn + (of_x[:, None] + columns[None, :]),
            mask=in_x[:, None] & in_c[None, :],
            other=0.0,
        )
        accumulator = tl.dot(tl.trans(left), right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def conv_grad_weight_kernel(
    grad, x, weight, threshold, grad_weight, grad_threshold,
    M, R, C, taps_w, in_h, in_w, out_h, out_w,
    scale_h, scale_w, origin_h, origin_w, step_h, step_w,
    stride_gn, stride_gr, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wr, stride_wc, stride_wh, stride_ww, stride_tr, stride_tc, stride_th, stride_tw,
    stride_or, stride_oc, stride_oh, stride_ow, stride_hr, stride_hc, stride_hh, stride_hw,
    THRESHOLD: tl.constexpr, SURROGATE: tl.constexpr, STRUCTURE_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One tile of dW [R, C] of tap program_id(1) and channel group program_id(2).

    grad_threshold is the result where thresholds are element-wise, else partial sums
    [taps, tiles of C, groups * R].
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_r, tile_c = tile_of_program(tl.cdiv(R, BLOCK_R), tiles_c, GROUP)
    tap = tl.program_id(1)
    kh = tap // taps_w
    kw = tap - kh * taps_w
    group = tl.program_id(2).to(tl.int64)
    in_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R) < R
    in_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C) < C
    dense = _dense_tile(
        grad + group * R * stride_gr, x + group * C * stride_xc,
        tile_r, tile_c, in_r, in_c, kh, kw, 0, M, in_h, in_w, out_h, out_w,
        scale_h, scale_w, origin_h, origin_w, step_h, step_w,
        stride_gn, stride_gr, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
        PRECISION, INDEX, BLOCK_R, BLOCK_C, BLOCK_M,
    )  # fmt: skip
    first, up, left = group * R, kh.to(tl.int64), kw.to(tl.int64)
    t_start = threshold + first * stride_tr
    h_start = grad_threshold
    if THRESHOLD == ELEMENT:
        t_start += up * stride_th + left * stride_tw
        h_start += first * stride_hr + up * stride_hh + left * stride_hw
    row_sum = write_gradients(
        dense,
        weight + first * stride_wr + up * stride_wh + left * stride_ww,
        t_start,
        grad_weight + first * stride_or + up * stride_oh + left * stride_ow,
        h_start,
        tile_r, tile_c, C, in_r,
        stride_wr, stride_wc, stride_tr, stride_tc, stride_or, stride_oc, stride_hr, stride_hc,
        THRESHOLD, SURROGATE, STRUCTURE_GRADIENT, INDEX, BLOCK_R, BLOCK_C, PIECES,
    )  # fmt: skip
    if THRESHOLD != ELEMENT:
        r = first + tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
        shares = (tap * tiles_c + tile_c).to(tl.int64) * R * tl.num_programs(2)
        tl.store(grad_threshold + shares + r, row_sum, mask=in_r)


@triton.jit
def conv_slabs_kernel(
    grad, x, slabs,
    M, R, C, taps, taps_w, part, in_h, in_w, out_h, out_w,
    scale_h, scale_w, origin_h, origin_w, step_h, step_w,
    stride_gn, stride_gr, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    stride_sp, stride_sr, stride_sc, stride_sh, stride_sw,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one slab of G: the positions part * (program_id(1) // taps) onwards."""
    tile_r, tile_c = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C), GROUP)
    split = tl.program_id(1) // taps
    tap = tl.program_id(1) - split * taps
    kh = tap // taps_w
    kw = tap - kh * taps_w
    group = tl.program_id(2).to(tl.int64)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_r, in_c = r < R, c < C
    dense = _dense_tile(
        grad + group * R * stride_gr, x + group * C * stride_xc,
        tile_r, tile_c, in_r, in_c, kh, kw, split * part, tl.minimum((split + 1) * part, M),
        in_h, in_w, out_h, out_w, scale_h, scale_w, origin_h, origin_w, step_h, step_w,
        stride_gn, stride_gr, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
        PRECISION, INDEX, BLOCK_R, BLOCK_C, BLOCK_M,
    )  # fmt: skip
    slab = slabs + split.to(tl.int64) * stride_sp + group * R * stride_sr
    slab += kh.to(tl.int64) * stride_sh + kw.to(tl.int64) * stride_sw
    inside = in_r[:, None] & in_c[None, :]
    offsets = r.to(tl.int64)[:, None] * stride_sr + c.to(tl.int64)[None, :] * stride_sc
    tl.store(slab + offsets, dense, mask=inside)


def conv_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    grad_weight: Tensor,
    grad_threshold: Tensor | None,
    lattices: tuple[Lattice, Lattice],
    groups: int,
    surrogate: str,
    structure_gradient: bool,
    tile: GradWeightTile,
    precision: str,
) -> Tensor | None:
    """Fill `grad_weight` [groups * R, C, taps_h, taps_w] from grad [N, groups * R, H', W'] and
    x [N, groups * C, H, W].

    threshold: one for each row, or as the weight; then `grad_threshold` is filled. Else returns the
    partial sums [parts, groups * R] of dt.
    """
    outputs, columns, taps_h, taps_w = weight.shape
    rows = outputs // groups
    tiles = triton.cdiv(rows, tile.block_r), triton.cdiv(columns, tile.block_c)
    taps = taps_h * taps_w
    axis, of_threshold = ELEMENT, threshold.stride()
    partial = None
    if grad_threshold is None:
        axis, of_threshold = ALONG_R, (threshold.stride(0), 0, 0, 0)
        shape = taps * tiles[1], outputs
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        grad_threshold = partial.as_strided((1, 1, 1, 1), (0, 0, 0, 0))
    with on_device_of(x):
        conv_grad_weight_kernel[(tiles[0] * tiles[1], taps, groups)](
            grad, x, weight, threshold, grad_weight, grad_threshold,
            _positions(grad), rows, columns, taps_w, *_geometry(grad, x, lattices),
            *grad.stride(), *x.stride(), *weight.stride(), *of_threshold,
            *grad_weight.stride(), *grad_threshold.stride(),
            THRESHOLD=axis.value, SURROGATE=SURROGATE_CODES[surrogate],
            STRUCTURE_GRADIENT=structure_gradient, PRECISION=precision,
            INDEX=index_dtype(
                *_extents(grad, x, tile),
                tile.block_r * weight.stride(0), tile.block_c * weight.stride(1),
                tile.block_r * grad_weight.stride(0), tile.block_c * grad_weight.stride(1),
            ),
            BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, BLOCK_M=tile.block_m,
            GROUP=tile.group, PIECES=tile.pieces,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return partial


def conv_slabs(
    grad: Tensor,
    x: Tensor,
    like: Tensor,
    lattices: tuple[Lattice, Lattice],
    groups: int,
    tile: GradWeightTile,
    precision: str,
) -> Tensor:
    """G as float32 partial sums [parts, *like.shape] over the positions, each in the layout of
    `like`, which is dense."""
    outputs, columns, taps_h, taps_w = like.shape
    rows = outputs // groups
    positions = _positions(grad)
    # Without any, one slab of zeros.
    part = triton.cdiv(max(triton.cdiv(positions, tile.split), 1), tile.block_m) * tile.block_m
    parts = max(triton.cdiv(positions, part), 1)
    slabs = torch.empty_strided(
        (parts, *like.shape), (like.numel(), *like.stride()), dtype=torch.float32, device=x.device
    )
    tiles = triton.cdiv(rows, tile.block_r) * triton.cdiv(columns, tile.block_c)
    taps = taps_h * taps_w
    with on_device_of(x):
        conv_slabs_kernel[(tiles, parts * taps, groups)](
            grad, x, slabs, positions, rows, columns, taps, taps_w, part,
            *_geometry(grad, x, lattices), *grad.stride(), *x.stride(), *slabs.stride(),
            PRECISION=precision, INDEX=index_dtype(*_extents(grad, x, tile)),
            BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, BLOCK_M=tile.block_m, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return slabs


def _positions(grad: Tensor) -> int:
    return grad.shape[0] * grad.shape[2] * grad.shape[3]


def _geometry(grad: Tensor, x: Tensor, lattices: tuple[Lattice, Lattice]) -> tuple[int, ...]:
    vertical, horizontal = lattices
    return (
        *x.shape[2:], *grad.shape[2:], vertical.scale, horizontal.scale,
        vertical.origin, horizontal.origin, vertical.step, horizontal.step,
    )  # fmt: skip


def _extents(grad: Tensor, x: Tensor, tile: GradWeightTile) -> tuple[int, ...]:
    """How far a tile of either operand reaches along its axes, in elements."""
    return (
        reach(grad, grad.shape, tile.block_m), tile.block_r * grad.stride(1),
        reach(x, grad.shape, tile.block_m), tile.block_c * x.stride(1),
    )  # fmt: skip
