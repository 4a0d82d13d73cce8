"""Compute the masked convolution and its gradient by the input, each an implicit matrix product.

Both are out^T [R, positions] = sum over taps of A(tap) [R, C] in(tap)^T [C, positions], where
in(tap) is the part of the input that the tap reads: gathered while loading, never stored. In the
forward pass R are the filters, and positions are those of the output. In the gradient R are the
input's channels, and positions those of the input, one launch for each residue of the stride, since
other taps reach each residue. The masked weight is the left operand for the reason in `product.py`.

A matrix product cannot skip positions outside the images: it multiplies weights by zeros there. So
a NaN weight reaches every position of the tile, even where its tap lies outside the image; the
reference leaves these finite.

Thresholds are the effective ones. A convolution reads its weight once for every tile of positions,
so one more pass before it, which decides about the collapse guard, costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, CompiledTile, cdiv, index_dtype, odd, on_device_of
from .masking import ALONG_C, ALONG_R, ELEMENT, load_threshold, nan_of, operand
from .matrix import Strided
from .product import tile_of_program
from .tiles import ProductTile


class Lattice(NamedTuple):
    """Map, along one dimension, output u and tap k to input u * scale + origin + k * step.

    Positions outside the input read zero.
    """

    scale: int
    origin: int
    step: int


class KernelGeometry(NamedTuple):
    """Hold a convolution as kernels take it: its sizes, and its lattices along both dimensions.

    M and the images' sizes vary from call to call, and are `odd`: kernels start by `without_odd`.
    """

    M: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    R: int
    C: int
    taps_h: int
    taps_w: int
    scale_h: int
    scale_w: int
    origin_h: int
    origin_w: int
    step_h: int
    step_w: int


class Image(NamedTuple):
    """Hold images [N, C, H, W] as kernels take them: where they start, and their strides."""

    start: Tensor
    n: int
    c: int
    h: int
    w: int


class Filters(NamedTuple):
    """Hold filters [groups (or slabs), R, C, taps_h, taps_w] as kernels take them."""

    start: Tensor
    row: int
    column: int
    h: int
    w: int
    group: int


@triton.jit
def without_odd(geometry):
    """Return the geometry with its sizes themselves in place of `odd` ones."""
    return KernelGeometry(
        geometry.M >> 1, geometry.in_h >> 1, geometry.in_w >> 1,
        geometry.out_h >> 1, geometry.out_w >> 1, *geometry[5:],
    )  # fmt: skip


@triton.jit
def locate(first, height, width, POSITIONS: tl.constexpr):
    """Return the image of position `first`; then for it and the positions after it (POSITIONS in
    all) the number of images after that one, the row and the column."""
    size = height * width
    image = first // size
    local = (first - image * size).to(tl.int32) + tl.arange(0, POSITIONS)
    n = local // size
    rest = local - n * size
    row = rest // width
    return image, n, row, rest - row * width


@triton.jit
def matrix_of_tap(filters, group, kh, kw):
    """Return the matrix [R, C] of a group's tap (kh, kw)."""
    start = filters.start + group * filters.group
    start += kh.to(tl.int64) * filters.h + kw.to(tl.int64) * filters.w
    return Strided(start, filters.row, filters.column)


@triton.jit
def conv_product_kernel(
    x, weight, threshold, bias, out, geometry, stride_x, stride_w, stride_t, stride_o,
    THRESHOLD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of R x positions of channel group program_id(1).

    R and C are channels of one group. The loop takes all channels of one tap, then the next tap.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_C: tl.constexpr = TILE.block_c
    INDEX: tl.constexpr = TILE.index
    geometry = without_odd(geometry)
    M, R, C = geometry.M, geometry.R, geometry.C
    x, out = Image(x, *stride_x), Image(out, *stride_o)
    weight, threshold = Filters(weight, *stride_w), Filters(threshold, *stride_t)
    tile_r, tile_m = tile_of_program(tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M), TILE.group)
    group = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    r = tile_r * BLOCK_R + rows
    in_r = r < R
    first = tile_m.to(tl.int64) * BLOCK_M
    in_m = tl.arange(0, BLOCK_M) < M - first
    image, n, u_h, u_w = locate(first, geometry.out_h, geometry.out_w, BLOCK_M)
    h0 = u_h * geometry.scale_h + geometry.origin_h
    w0 = u_w * geometry.scale_w + geometry.origin_w
    x_start = x.start + image * x.n + group * C * x.c
    x_positions = n.to(INDEX) * x.n + h0.to(INDEX) * x.h + w0.to(INDEX) * x.w
    w_start = weight.start + group * weight.group + tile_r.to(tl.int64) * BLOCK_R * weight.row
    t_start = threshold.start + group * threshold.group
    of_rows = tl.zeros((BLOCK_R, 1), tl.float32)
    if THRESHOLD == ALONG_R:
        of_rows = load_threshold(
            Strided(t_start, threshold.row, 0), r, columns, in_r, in_r, ALONG_R, tl.float32
        )
    steps_c = tl.cdiv(C, BLOCK_C)
    accumulator = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    steps = geometry.taps_h * geometry.taps_w * steps_c
    for step in tl.range(0, steps, loop_unroll_factor=TILE.unroll):
        tap = step // steps_c
        kh = tap // geometry.taps_w
        kw = tap - kh * geometry.taps_w
        c = (step - tap * steps_c) * BLOCK_C + columns
        in_c = c < C
        h, w = h0 + kh * geometry.step_h, w0 + kw * geometry.step_w
        in_x = in_m & (h >= 0) & (h < geometry.in_h) & (w >= 0) & (w < geometry.in_w)
        x_tap = tl.cast(kh * geometry.step_h, INDEX) * x.h
        x_tap += tl.cast(kw * geometry.step_w, INDEX) * x.w
        xt = tl.load(
            x_start + (x_positions + x_tap)[None, :] + (c.to(INDEX) * x.c)[:, None],
            mask=in_x[None, :] & in_c[:, None],
            other=0.0,
        )
        w_tap = tl.cast(kh, tl.int64) * weight.h + tl.cast(kw, tl.int64) * weight.w
        t_tap = t_start
        if THRESHOLD == ELEMENT:
            t_tap += tl.cast(kh, tl.int64) * threshold.h + tl.cast(kw, tl.int64) * threshold.w
        tile = rows.to(INDEX)[:, None] * weight.row + c.to(INDEX)[None, :] * weight.column
        inside = in_r[:, None] & in_c[None, :]
        w_tile = tl.load(w_start + w_tap + tile, mask=inside, other=0.0).to(tl.float32)
        t = of_rows
        if THRESHOLD != ALONG_R:
            of_tap = Strided(t_tap, threshold.row, threshold.column)
            t = load_threshold(of_tap, r, c, in_r, in_c, THRESHOLD, tl.float32)
        left = operand(w_tile, t, THRESHOLD).to(x.start.dtype.element_ty)
        accumulator = tl.dot(left, xt, accumulator, input_precision=TILE.precision)
    if THRESHOLD != ELEMENT:
        of_columns = Strided(t_start, threshold.row, threshold.column)
        accumulator += nan_of(of_columns, of_rows, 0, C, THRESHOLD)
    if bias is not None:
        of_rows = tl.load(bias + group * R + r, mask=in_r, other=0.0)
        accumulator += of_rows.to(tl.float32)[:, None]
    out_start = out.start + image * out.n + (group * R + tile_r * BLOCK_R) * out.c
    positions = n.to(INDEX) * out.n + u_h.to(INDEX) * out.h + u_w.to(INDEX) * out.w
    tl.store(
        out_start + positions[:, None] + (rows.to(INDEX) * out.c)[None, :],
        tl.trans(accumulator.to(out.start.dtype.element_ty)),
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
    threshold: one for each row of the weight, or the weight's shape. All may have any strides.
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
    tiles = cdiv(rows, tile.block_r) * cdiv(positions, tile.block_m)
    index = index_dtype(
        reach(x, out.shape, tile.block_m),
        reach(out, out.shape, tile.block_m),
        columns * x.stride(1), tile.block_r * out.stride(1),
        tile.block_r * strides[0], columns * strides[1],
    )  # fmt: skip
    with on_device_of(x):
        conv_product_kernel[(tiles, groups)](
            x, weight, threshold, bias, out, geometry_of(rows, columns, x, weight, out, lattices),
            x.stride(), (*strides, group_stride), (*of_threshold, threshold_group_stride),
            out.stride(), THRESHOLD=axis.value,
            TILE=CompiledTile(
                precision, index, tile.block_m, tile.block_r, tile.block_c, tile.group,
                unroll=tile.unroll,
            ),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def geometry_of(
    R: int, C: int, x: Tensor, weight: Tensor, out: Tensor, lattices: tuple[Lattice, Lattice]
) -> KernelGeometry:
    M = out.shape[0] * out.shape[2] * out.shape[3]
    sizes = map(odd, (M, *x.shape[2:], *out.shape[2:]))
    along_both = (value for pair in zip(*lattices, strict=True) for value in pair)
    return KernelGeometry._make((*sizes, R, C, *weight.shape[2:], *along_both))


def reach(image: Tensor, positions: tuple[int, ...], block: int) -> int:
    """Return a bound on the distance in memory, in elements, of what `block` positions read.

    They read from `image` [N, C, H, W]; `positions` is the shape of the images they are counted in.
    """
    images = block // max(positions[2] * positions[3], 1) + 2
    _, _, height, width = image.shape
    return images * image.stride(0) + height * image.stride(2) + width * image.stride(3)
