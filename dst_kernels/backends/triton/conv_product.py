"""The masked convolution and its gradient by the input, each an implicit matrix product.

Both are out^T [R, positions] = sum over taps of A(tap) [R, C] in(tap)^T [C, positions], where
in(tap) is the input as the tap sees it: gathered while it is loaded, never written out. The forward
pass has filters for R and positions of the output; the gradient has the input's channels for R and
positions of the input, by the residue of the stride, since each residue is reached by taps of its
own. The masked weight is the left operand for the reason given in `product.py`.

Thresholds are the effective ones. A convolution reads its weight once for every tile of positions,
so that deciding about the collapse guard beforehand, in a pass of its own, costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, index_dtype, on_device_of
from .masking import ALONG_C, ALONG_R, ELEMENT, load_threshold, masked, transposed_axis
from .product import tile_of_program
from .tiles import ProductTile

__all__ = ["Lattice", "conv_product", "conv_product_kernel", "locate", "reach"]


class Lattice(NamedTuple):
    """Along one dimension, tap k of output position u reads position u * scale + origin + k * step.

    Positions outside the input read zero.
    """

    scale: int
    origin: int
    step: int


@triton.jit
def locate(first, height, width, POSITIONS: tl.constexpr):
    """Of POSITIONS positions from `first`: the first one's image, then each one's image less that,
    its row and its column."""
    size = height * width
    image = first // size
    local = (first - image * size).to(tl.int32) + tl.arange(0, POSITIONS)
    n = local // size
    rest = local - n * size
    row = rest // width
    return image, n, row, rest - row * width


@triton.jit
def conv_product_kernel(
    x, weight, threshold, bias, out,
    M, R, C, taps_h, taps_w, in_h, in_w, out_h, out_w,
    scale_h, scale_w, origin_h, origin_w, step_h, step_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wr, stride_wc, stride_wh, stride_ww, stride_wg,
    stride_tr, stride_tc, stride_th, stride_tw, stride_tg,
    stride_on, stride_or, stride_oh, stride_ow,
    THRESHOLD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of R x positions of channel group program_id(1).

    R and C are channels of one group. Steps go through the channels of one tap, then to the next.
    """
    tile_r, tile_m = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M), GROUP)
    group = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    r = tile_r * BLOCK_R + rows
    in_r = r < R
    first = tile_m.to(tl.int64) * BLOCK_M
    in_m = tl.arange(0, BLOCK_M) < M - first
    image, n, u_h, u_w = locate(first, out_h, out_w, BLOCK_M)
    h0 = u_h * scale_h + origin_h
    w0 = u_w * scale_w + origin_w
    x_start = x + image * stride_xn + group * C * stride_xc
    x_positions = n.to(INDEX) * stride_xn + h0.to(INDEX) * stride_xh + w0.to(INDEX) * stride_xw
    w_rows = rows.to(INDEX) * stride_wr
    w_start = weight + group * stride_wg + tile_r.to(tl.int64) * BLOCK_R * stride_wr
    t_start = threshold + group * stride_tg
    steps_c = tl.cdiv(C, BLOCK_C)
    accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for step in tl.range(0, taps_h * taps_w * steps_c, loop_unroll_factor=UNROLL):
        tap = step // steps_c
        kh = tap // taps_w
        kw = tap - kh * taps_w
        c = (step - tap * steps_c) * BLOCK_C + columns
        in_c = c < C
        h, w = h0 + kh * step_h, w0 + kw * step_w
        in_x = in_m & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
        x_tap = tl.cast(kh * step_h, INDEX) * stride_xh + tl.cast(kw * step_w, INDEX) * stride_xw
        xt = tl.load(
            x_start + (x_positions + x_tap)[None, :] + (c.to(INDEX) * stride_xc)[:, None],
            mask=in_x[None, :] & in_c[:, None],
            other=0.0,
        )
        w_tap = tl.cast(kh, tl.int64) * stride_wh + tl.cast(kw, tl.int64) * stride_ww
        t_tap = t_start
        if THRESHOLD == ELEMENT:
            t_tap += tl.cast(kh, tl.int64) * stride_th + tl.cast(kw, tl.int64) * stride_tw
        w_columns = c.to(INDEX) * stride_wc
        # The tile as it lies in memory: [C, R] where the rows of A are nearer to each other.
        if TRANSPOSED:
            tile = w_columns[:, None] + w_rows[None, :]
            inside = in_c[:, None] & in_r[None, :]
            t = load_threshold(
                t_tap, c, r, in_c, in_r, stride_tc, stride_tr,
                transposed_axis(THRESHOLD), tl.float32,
            )  # fmt: skip
        else:
            tile = w_rows[:, None] + w_columns[None, :]
            inside = in_r[:, None] & in_c[None, :]
            t = load_threshold(
                t_tap, r, c, in_r, in_c, stride_tr, stride_tc, THRESHOLD, tl.float32
            )  # fmt: skip
        stored = tl.load(w_start + w_tap + tile, mask=inside, other=0.0).to(tl.float32)
        left = masked(stored, t).to(x.dtype.element_ty)
        if TRANSPOSED:
            left = tl.trans(left)
        accumulator = tl.dot(left, xt, accumulator, input_precision=PRECISION)
    if HAS_BIAS:
        of_rows = tl.load(bias + group * R + r, mask=in_r, other=0.0)
        accumulator += of_rows.to(tl.float32)[:, None]
    out_start = out + image * stride_on + (group * R + tile_r * BLOCK_R) * stride_or
    positions = n.to(INDEX) * stride_on + u_h.to(INDEX) * stride_oh + u_w.to(INDEX) * stride_ow
    tl.store(
        out_start + positions[:, None] + (rows.to(INDEX) * stride_or)[None, :],
        tl.trans(accumulator.to(out.dtype.element_ty)),
        mask=in_m[:, None] & in_r[None, :],
    )


def conv_product(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lattices: tuple[Lattice, Lattice],
    groups: int,
    tile: ProductTile,
    precision: str,
    *,
    by_input: bool = False,
) -> None:
    """Fill `out` [N, groups * R, H', W'] from x [N, groups * C, H, W].

    weight [groups * R, C, taps_h, taps_w], or [groups * C, R, taps_h, taps_w] with `by_input`;
    threshold: one for each of its rows, or as the weight. All in any strides.
    """
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    strides = list(weight.stride())
    group_stride = rows * strides[0]
    element_wise = threshold.dim() > 1
    of_threshold = list(threshold.stride()) if element_wise else [threshold.stride(0), 0, 0, 0]
    threshold_group_stride = rows * of_threshold[0]
    if by_input:
        rows, columns = columns, rows
        for each in (strides, of_threshold):
            each[0], each[1] = each[1], each[0]
    axis = ELEMENT if element_wise else ALONG_C if by_input else ALONG_R
    positions = out.shape[0] * out.shape[2] * out.shape[3]
    tiles = triton.cdiv(rows, tile.block_r) * triton.cdiv(positions, tile.block_m)
    vertical, horizontal = lattices
    with on_device_of(x):
        conv_product_kernel[(tiles, groups)](
            x, weight, threshold, out if bias is None else bias, out,
            positions, rows, columns, *weight.shape[2:], *x.shape[2:], *out.shape[2:],
            vertical.scale, horizontal.scale, vertical.origin, horizontal.origin,
            vertical.step, horizontal.step,
            *x.stride(), *strides, group_stride, *of_threshold, threshold_group_stride,
            *out.stride(),
            THRESHOLD=axis.value, HAS_BIAS=bias is not None, PRECISION=precision,
            TRANSPOSED=strides[0] < strides[1],
            INDEX=index_dtype(
                reach(x, out.shape, tile.block_m),
                reach(out, out.shape, tile.block_m),
                columns * x.stride(1), tile.block_r * out.stride(1),
                tile.block_r * strides[0], columns * strides[1],
            ),
            BLOCK_M=tile.block_m, BLOCK_R=tile.block_r, BLOCK_C=tile.block_c,
            UNROLL=tile.unroll, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def reach(image: Tensor, positions: tuple[int, ...], block: int) -> int:
    """How far apart in memory, in elements, `image` [N, C, H, W] has what `block` positions meet.

    `positions` is the shape of the images that positions are counted in.
    """
    images = block // max(positions[2] * positions[3], 1) + 2
    _, _, height, width = image.shape
    return images * image.stride(0) + height * image.stride(2) + width * image.stride(3)
