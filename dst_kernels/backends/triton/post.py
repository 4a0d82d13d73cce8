"""Compute dW and dt from the dense gradient G in one streaming pass over the weight: `post`.

Each row's sum has a fixed order. G may come as several slabs (partial sums of a split product),
which are added up in order first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, TRITON_DTYPES, cdiv, odd, on_device_of
from .masking import (
    ELEMENT,
    LAYER,
    SURROGATE_CODES,
    Rule,
    elements,
    load_threshold,
    weight_gradients,
)
from .matrix import Matrix, compute_dtype
from .tiles import StreamTile


class Slabs(NamedTuple):
    """Hold matrices as `Strided` does, `distance` apart; kernels add them up.

    `number` is `odd`, or None for a single matrix.
    """

    start: Tensor
    row: int
    column: int
    number: int | None
    distance: int


@triton.jit
def post_kernel(
    dense, weight, threshold, grad_weight, grad_threshold, R, C, chunk,
    RULE: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take ROWS rows, block program_id(0), and `chunk` columns from program_id(1) * chunk on.

    grad_threshold is the result where thresholds are element-wise, else partial sums [chunks, R].
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_r = r < R
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, C)
    row_sum = tl.zeros((ROWS,), COMPUTE)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        in_c = c < end
        inside = in_r[:, None] & in_c[None, :]
        w = tl.load(elements(weight, r, c), mask=inside, other=0.0).to(COMPUTE)
        from_dense = elements(dense, r, c)
        g = tl.load(from_dense, mask=inside, other=0.0).to(COMPUTE)
        if dense.number is not None:
            for slab in range(1, dense.number >> 1):
                from_slab = from_dense + tl.cast(slab, tl.int64) * dense.distance
                g += tl.load(from_slab, mask=inside, other=0.0).to(COMPUTE)
        t = load_threshold(threshold, r, c, in_r, in_c, RULE.axis, COMPUTE)
        gw, gt = weight_gradients(g, w, t, RULE)
        dtype = grad_weight.start.dtype.element_ty
        tl.store(elements(grad_weight, r, c), gw.to(dtype), mask=inside)
        if RULE.axis == ELEMENT:
            dtype_t = grad_threshold.start.dtype.element_ty
            tl.store(elements(grad_threshold, r, c), gt.to(dtype_t), mask=inside)
        else:
            # Outside the tile g is 0, but 0 * NaN is not.
            row_sum += tl.sum(tl.where(inside, gt, 0.0), axis=1)
    if RULE.axis != ELEMENT:
        of_chunk = grad_threshold.start + tl.program_id(1).to(tl.int64) * R
        tl.store(of_chunk + r, row_sum, mask=in_r)


def post(
    dense: Matrix,
    weight: Matrix,
    threshold: Matrix,
    grad_weight: Matrix,
    grad_threshold: Matrix | None,
    surrogate: str,
    structure_gradient: bool,
    tile: StreamTile,
    *,
    slabs: int | None = None,
    slab_stride: int = 0,
) -> Tensor | None:
    """Fill `grad_weight`, and `grad_threshold` where thresholds are element-wise.

    Otherwise return dt's partial sums [chunks, rows] for `finish_threshold_gradient`. G is `dense`,
    or, where `slabs` says how many there are, their sum.
    """
    R, C = weight.rows, weight.columns
    number = None if slabs is None else odd(slabs)
    row_blocks = cdiv(R, tile.rows)
    chunk, chunks = tile.chunk(row_blocks, C)
    dtype = compute_dtype(weight.tensor.dtype, threshold.tensor.dtype)
    partial = None
    if grad_threshold is None:
        partial = torch.empty((chunks, R), dtype=dtype, device=weight.tensor.device)
        grad_threshold = Matrix(partial, R, C, 0, 0)
    with on_device_of(weight.tensor):
        post_kernel[(row_blocks, chunks)](
            Slabs(*dense.strided, number, slab_stride), weight.strided, threshold.strided,
            grad_weight.strided, grad_threshold.strided, R, C, chunk,
            RULE=Rule(threshold.axis, SURROGATE_CODES[surrogate], structure_gradient),
            COMPUTE=TRITON_DTYPES[dtype], ROWS=tile.rows, BLOCK=tile.block,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return partial


def finish_threshold_gradient(partial: Tensor, threshold: Tensor, axis: int) -> Tensor:
    """Return dt from partial sums [parts, rows]; torch's sum has a fixed order on one device."""
    if axis == LAYER.value:
        total = partial.sum()
    elif len(partial) == 1:
        total = partial[0]
    else:
        total = partial.sum(0)
    return total.reshape(threshold.shape).to(threshold.dtype)
