"""Compute dW and dt of a convolution in one pass: G never leaves the accumulator.

This works as `grad_weight.py` and shares its epilogue. A program owns a tile of filters x channels
of one tap and sums over positions of the output; for each it gathers the input that the tap reads.
A weight has few tiles and an image many positions, so positions are split most of the time:
programs then write slabs of G in the weight's own layout, and `post` computes dW and dt from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_product import (
    Filters,
    Image,
    Lattice,
    geometry_of,
    locate,
    matrix_of_tap,
    reach,
    without_odd,
)
from .grad_weight import compiled_tile, write_gradients
from .launch import OPTIONS, cdiv, on_device_of
from .masking import ALONG_R, ELEMENT, SURROGATE_CODES, Rule
from .product import tile_of_program
from .tiles import GradWeightTile


@triton.jit
def _dense_tile(
    grad, x, geometry, first_r, first_c, in_r, in_c, kh, kw, begin, end, TILE: tl.constexpr
):  # fmt: skip
    """Return G of tap (kh, kw), from channels `first_r`, `first_c`, over positions begin to end."""
    INDEX: tl.constexpr = TILE.index
    rows = tl.arange(0, TILE.block_r).to(INDEX) * grad.c
    columns = tl.arange(0, TILE.block_c).to(INDEX) * x.c
    grad_start, x_start = grad.start + first_r * grad.c, x.start + first_c * x.c
    down = geometry.origin_h + kh * geometry.step_h
    right = geometry.origin_w + kw * geometry.step_w
    accumulator = tl.full((TILE.block_r, TILE.block_c), 0.0, tl.float32)
    for start in range(begin, end, TILE.block_m):
        in_m = tl.arange(0, TILE.block_m) < end - start
        image, n, u_h, u_w = locate(
            tl.cast(start, tl.int64), geometry.out_h, geometry.out_w, TILE.block_m
        )
        of_grad = n.to(INDEX) * grad.n + u_h.to(INDEX) * grad.h + u_w.to(INDEX) * grad.w
        dy = tl.load(
            grad_start + image * grad.n + (of_grad[:, None] + rows[None, :]),
            mask=in_m[:, None] & in_r[None, :],
            other=0.0,
        )
        h, w = u_h * geometry.scale_h + down, u_w * geometry.scale_w + right
        in_x = in_m & (h >= 0) & (h < geometry.in_h) & (w >= 0) & (w < geometry.in_w)
        of_x = n.to(INDEX) * x.n + h.to(INDEX) * x.h + w.to(INDEX) * x.w
        seen = tl.load(
            x_start + image * x.n + (of_x[:, None] + columns[None, :]),
            mask=in_x[:, None] & in_c[None, :],
            other=0.0,
        )
        accumulator = tl.dot(tl.trans(dy), seen, accumulator, input_precision=TILE.precision)
    return accumulator


@triton.jit
def conv_grad_weight_kernel(
    grad, x, weight, threshold, grad_weight, grad_threshold, geometry,
    RULE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dW [R, C] of tap program_id(1) and channel group program_id(2).

    grad_threshold is the result where thresholds are element-wise, else partial sums
    [taps, tiles of C, groups * R].
    """
    geometry = without_odd(geometry)
    M, R, C = geometry.M, geometry.R, geometry.C
    tiles_c = tl.cdiv(C, TILE.block_c)
    tile_r, tile_c = tile_of_program(tl.cdiv(R, TILE.block_r), tiles_c, TILE.group)
    tap = tl.program_id(1)
    kh = tap // geometry.taps_w
    kw = tap - kh * geometry.taps_w
    group = tl.program_id(2).to(tl.int64)
    in_r = tile_r * TILE.block_r + tl.arange(0, TILE.block_r) < R
    in_c = tile_c * TILE.block_c + tl.arange(0, TILE.block_c) < C
    first_r = group * R + tile_r * TILE.block_r
    dense = _dense_tile(
        grad, x, geometry, first_r, group * C + tile_c * TILE.block_c,
        in_r, in_c, kh, kw, 0, M, TILE,
    )  # fmt: skip
    row_sum = write_gradients(
        dense, matrix_of_tap(weight, group, kh, kw), matrix_of_tap(threshold, group, kh, kw),
        matrix_of_tap(grad_weight, group, kh, kw), matrix_of_tap(grad_threshold, group, kh, kw),
        tile_r, tile_c, C, in_r, RULE, TILE,
    )  # fmt: skip
    if RULE.axis != ELEMENT:
        r = first_r + tl.arange(0, TILE.block_r)
        shares = (tap * tiles_c + tile_c).to(tl.int64) * R * tl.num_programs(2)
        tl.store(grad_threshold.start + shares + r, row_sum, mask=in_r)


@triton.jit(do_not_specialize=("steps",))
def conv_slabs_kernel(
    grad, x, slabs, steps, geometry, stride_g, stride_x, stride_s, TILE: tl.constexpr
):  # fmt: skip
    """Compute a tile of a slab of G: `steps` tiles of positions, from step
    steps * (program_id(1) // taps) on."""
    geometry = without_odd(geometry)
    M, R, C = geometry.M, geometry.R, geometry.C
    tile_r, tile_c = tile_of_program(tl.cdiv(R, TILE.block_r), tl.cdiv(C, TILE.block_c), TILE.group)
    taps = geometry.taps_h * geometry.taps_w
    split = tl.program_id(1) // taps
    tap = tl.program_id(1) - split * taps
    kh = tap // geometry.taps_w
    kw = tap - kh * geometry.taps_w
    group = tl.program_id(2).to(tl.int64)
    part = steps * TILE.block_m
    r = tile_r * TILE.block_r + tl.arange(0, TILE.block_r)
    c = tile_c * TILE.block_c + tl.arange(0, TILE.block_c)
    in_r, in_c = r < R, c < C
    dense = _dense_tile(
        Image(grad, *stride_g), Image(x, *stride_x), geometry,
        group * R + tile_r * TILE.block_r, group * C + tile_c * TILE.block_c,
        in_r, in_c, kh, kw, split * part, tl.minimum((split + 1) * part, M), TILE,
    )  # fmt: skip
    slab = matrix_of_tap(Filters(slabs, *stride_s), split.to(tl.int64), kh, kw)
    start = slab.start + group * R * slab.row
    offsets = r.to(tl.int64)[:, None] * slab.row + c.to(tl.int64)[None, :] * slab.column
    tl.store(start + offsets, dense, mask=in_r[:, None] & in_c[None, :])


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

    threshold: [groups * R], or the weight's shape; then `grad_threshold` is filled. Otherwise
    return the partial sums [parts, groups * R] of dt.
    """
    outputs, columns, taps_h, taps_w = weight.shape
    rows = outputs // groups
    tiles = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    taps = taps_h * taps_w
    axis, partial = ELEMENT, None
    if grad_threshold is None:
        axis, shape = ALONG_R, (taps * tiles[1], outputs)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        grad_threshold = partial.as_strided((1, 1, 1, 1), (0, 0, 0, 0))
        threshold = threshold.as_strided(weight.shape, (threshold.stride(0), 0, 0, 0))
    filters = (
        Filters(tensor, *(*tensor.stride(), rows * tensor.stride(0)))
        for tensor in (weight, threshold, grad_weight, grad_threshold)
    )
    with on_device_of(x):
        conv_grad_weight_kernel[(tiles[0] * tiles[1], taps, groups)](
            Image(grad, *grad.stride()), Image(x, *x.stride()), *filters,
            geometry_of(rows, columns, x, weight, grad, lattices),
            RULE=Rule(axis.value, SURROGATE_CODES[surrogate], structure_gradient),
            TILE=compiled_tile(
                tile, precision, *_extents(grad, x, tile),
                tile.block_r * weight.stride(0), tile.block_c * weight.stride(1),
                tile.block_r * grad_weight.stride(0), tile.block_c * grad_weight.stride(1),
            ),
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
    """Return G as float32 partial sums [parts, *like.shape] over the positions.

    Each has the layout of `like`, which is dense.
    """
    outputs, columns, taps_h, taps_w = like.shape
    rows = outputs // groups
    positions = grad.shape[0] * grad.shape[2] * grad.shape[3]
    # Without positions there is one slab of zeros.
    steps = cdiv(max(cdiv(positions, tile.split), 1), tile.block_m)
    parts = max(cdiv(positions, steps * tile.block_m), 1)
    slabs = torch.empty_strided(
        (parts, *like.shape), (like.numel(), *like.stride()), dtype=torch.float32, device=x.device
    )
    tiles = cdiv(rows, tile.block_r) * cdiv(columns, tile.block_c)
    with on_device_of(x):
        conv_slabs_kernel[(tiles, parts * taps_h * taps_w, groups)](
            grad, x, slabs, steps, geometry_of(rows, columns, x, like, grad, lattices),
            grad.stride(), x.stride(), (*like.stride(), slabs.stride(0)),
            TILE=compiled_tile(tile, precision, *_extents(grad, x, tile)),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return slabs


def _extents(grad: Tensor, x: Tensor, tile: GradWeightTile) -> tuple[int, ...]:
    """Return the extents of a tile of either operand along its axes, in elements of memory."""
    return (
        reach(grad, grad.shape, tile.block_m), tile.block_r * grad.stride(1),
        reach(x, grad.shape, tile.block_m), tile.block_c * x.stride(1),
    )  # fmt: skip
