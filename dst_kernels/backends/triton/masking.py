"""Hold device functions that all kernels share: thresholds, masking, surrogate derivatives.

Tiles of the weight are [R, C]. Numbers are compared in float32, or in float64 if the weight or the
threshold is float64; the order of operations is the reference's, so masks agree bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# The axis of a tile along which thresholds vary: the kernels' THRESHOLD.
LAYER = tl.constexpr(0)
ALONG_R = tl.constexpr(1)
ALONG_C = tl.constexpr(2)
ELEMENT = tl.constexpr(3)

SURROGATE_CODES = {"long_tailed": 0, "rectangular": 1, "triangular": 2, "straight_through": 3}


class Rule(NamedTuple):
    """Say along which axis thresholds vary and how gradients are computed: the kernels' RULE."""

    axis: int
    surrogate: int
    structure_gradient: bool


@triton.jit
def elements(matrix, r, c):
    """Return pointers to the elements of rows r and columns c."""
    return matrix.start + r[:, None] * matrix.row + c[None, :] * matrix.column


@triton.jit
def load_threshold(
    threshold, r, c, in_r, in_c, THRESHOLD: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Return the thresholds of the tile with rows r and columns c, broadcastable against it."""
    if THRESHOLD == LAYER:
        return tl.load(threshold.start).to(COMPUTE)
    elif THRESHOLD == ALONG_R:
        of_rows = tl.load(threshold.start + r * threshold.row, mask=in_r, other=0.0)
        return of_rows.to(COMPUTE)[:, None]
    elif THRESHOLD == ALONG_C:
        of_columns = tl.load(threshold.start + c * threshold.column, mask=in_c, other=0.0)
        return of_columns.to(COMPUTE)[None, :]
    else:
        of_rows = r[:, None].to(tl.int64) * threshold.row
        of_tile = threshold.start + (of_rows + c[None, :].to(tl.int64) * threshold.column)
        return tl.load(of_tile, mask=in_r[:, None] & in_c[None, :], other=0.0).to(COMPUTE)


@triton.jit
def masked(weight, threshold):
    """Return W * M; NaN where W or t is NaN, since a weight is pruned only if |W| <= t."""
    nan_or_zero = tl.where(threshold != threshold, threshold, 0.0)
    return tl.where(tl.abs(weight) <= threshold, 0.0, weight + nan_or_zero)


@triton.jit
def operand(weight, threshold, THRESHOLD: tl.constexpr):
    """Return W * M as the left operand of a product, to whose sum `nan_of` is added.

    A threshold that is NaN makes all of its row or column NaN. In the loop of a product that would
    be one more instruction for each weight; on the sum it is one for each result.
    """
    if THRESHOLD == ELEMENT:
        return masked(weight, threshold)
    else:
        return tl.where(tl.abs(weight) <= threshold, 0.0, weight)


@triton.jit
def nan_of(threshold, of_rows, begin, end, THRESHOLD: tl.constexpr):
    """Return NaN where a threshold of the sum over columns begin to end is NaN, else 0.0.

    For thresholds along R, which are given as `of_rows` [R, 1], or along C.
    """
    if THRESHOLD == ALONG_R:
        return tl.where(of_rows != of_rows, of_rows, 0.0)
    else:
        SIZE: tl.constexpr = 1024
        nans = tl.zeros((SIZE,), tl.int32)
        for start in range(begin, end, SIZE):
            c = start + tl.arange(0, SIZE)
            t = tl.load(threshold.start + c * threshold.column, mask=c < end, other=0.0)
            nans += (t != t).to(tl.int32)
        return tl.where(tl.sum(nans, axis=0) > 0, float("nan"), 0.0)


@triton.jit
def _surrogate(margin, SURROGATE: tl.constexpr):
    """Return H(margin); NaN stays NaN."""
    distance = tl.abs(margin)
    if SURROGATE == 0:  # 2 - 4|x| meets the tail at 0.4, so both pieces are one maximum
        slope = 2.0 - 4.0 * distance
        tail = tl.full((), 0.4, slope.dtype)  # a bare 0.4 is a float32 in Triton 3.6
        height = tl.maximum(slope, tail, propagate_nan=tl.PropagateNan.ALL)
        return tl.where(distance > 1.0, 0.0, height)
    elif SURROGATE == 1:
        return tl.where(distance > 0.5, 0.0, 1.0 + (distance - distance))
    elif SURROGATE == 2:
        return tl.maximum(1.0 - distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(distance != distance, distance, 1.0)


@triton.jit
def weight_gradients(dense, weight, threshold, RULE: tl.constexpr):
    """Return (dW, each weight's summand of dt) from G; all in one dtype, broadcastable.

    dW = G M + G |W| H(Q), the second term only with a structure gradient; dt = -sum(G W H(Q)).
    """
    magnitude = tl.abs(weight)
    margin = magnitude - threshold
    through_mask = dense * _surrogate(margin, RULE.surrogate)
    grad_weight = tl.where(margin <= 0.0, 0.0, dense)
    if RULE.structure_gradient:
        grad_weight += through_mask * magnitude
    return grad_weight, -(through_mask * weight)
