"""Make effective thresholds, masked weights, and the gradients of both from G."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .matrix import as_matrices, as_threshold
from .pack import PackPlan, pack, pack_plan
from .post import finish_threshold_gradient, post
from .tiles import StreamTile, post_tile, stream_candidates
from .tuning import tuned, tuning_is_on


def effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> Tensor:
    """Do as `reference.effective_threshold`."""
    if reset_ratio is None or weight.numel() == 0:
        return threshold.clone()
    return _pack(weight, threshold, reset_ratio, None, False)[1]


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    reset_ratio: float | None,
    dtype: torch.dtype,
    commit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do as `reference.masked_weight`."""
    if weight.numel() == 0:
        return torch.empty_like(weight, dtype=dtype), threshold.clone()
    packed, effective = _pack(weight, threshold, reset_ratio, dtype, commit)
    return cast(Tensor, packed), effective


def _pack(
    weight: Tensor,
    threshold: Tensor,
    reset_ratio: float | None,
    dtype: torch.dtype | None,
    commit: bool,
) -> tuple[Tensor | None, Tensor]:
    packed = None if dtype is None else torch.empty_like(weight, dtype=dtype)
    effective = torch.empty_like(threshold)
    strides = weight.stride()
    layout = (
        weight.shape, weight.dtype, strides, threshold.shape, threshold.dtype, threshold.stride(),
        strides if packed is None else packed.stride(), effective.stride(), reset_ratio,
    )  # fmt: skip
    plan = pack_plan(*layout)
    if plan is None:
        # A row is not one piece of memory: call this again with dense copies.
        dense = threshold.contiguous() if threshold.shape == weight.shape else threshold
        results = _pack(weight.contiguous(), dense, reset_ratio, dtype, commit)
        if commit and dense is not threshold:
            threshold.copy_(dense)
        if packed is not None:
            packed.copy_(cast(Tensor, results[0]))
        return packed, effective.copy_(results[1])
    tensors = weight, threshold, packed, effective, commit
    if packed is not None and tuning_is_on():

        def run(tile: StreamTile) -> None:
            pack(*tensors, cast(PackPlan, pack_plan(*layout, tile)))

        purpose = f"pack guard={reset_ratio is not None} axis={plan.axis}"
        of_weight = _layout(plan.rows, plan.columns, plan.strides[0][1])
        problem = f"{purpose} {of_weight} {weight.dtype} to {dtype}"
        run(tuned(problem, plan.tile, stream_candidates(plan.tile), run, weight))
    else:
        pack(*tensors, plan)
    return packed, effective


def masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do as `reference.masked_weight_backward`."""
    if weight.numel() == 0:
        return torch.empty_like(weight), torch.zeros_like(threshold)
    return _post(grad, weight, threshold, surrogate, structure_gradient)


def _post(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor,
    surrogate: str,
    structure_gradient: bool,
) -> tuple[Tensor, Tensor]:
    element_wise = threshold.shape == weight.shape
    grad_weight = torch.empty_like(weight)
    if grad.stride() != grad_weight.stride():  # copy G into the weight's layout
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    tensors = [weight, grad_weight, grad]
    if element_wise:
        grad_threshold = torch.empty_like(threshold)
        tensors += [threshold, grad_threshold]
    seen = as_matrices(*tensors)
    if seen is None:
        # A row is not one piece of memory: call this again with dense copies.
        arguments = grad.contiguous(), weight.contiguous(), threshold.contiguous()
        results = _post(*arguments, surrogate, structure_gradient)
        return grad_weight.copy_(results[0]), torch.empty_like(threshold).copy_(results[1])
    matrix, written, dense = seen[:3]
    stored = seen[3] if element_wise else as_threshold(threshold, matrix)

    def run(tile: StreamTile) -> Tensor | None:
        return post(
            dense, matrix, stored, written, seen[4] if element_wise else None,
            surrogate, structure_gradient, tile,
        )  # fmt: skip

    tile = post_tile(matrix.columns, matrix.column_stride)
    if tuning_is_on():
        of_weight = _layout(matrix.rows, matrix.columns, matrix.column_stride)
        problem = f"post axis={stored.axis} {of_weight} {weight.dtype} {grad.dtype}"
        tile = tuned(problem, tile, stream_candidates(tile), run, weight)
    partial = run(tile)
    if partial is None:
        return grad_weight, grad_threshold
    return grad_weight, finish_threshold_gradient(partial, threshold, stored.axis)


def _layout(rows: int, columns: int, column_stride: int) -> str:
    """Return a weight's part of the name of a problem."""
    return f"{rows}x{columns} by rows={column_stride == 1}"
