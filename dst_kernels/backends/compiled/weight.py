"""Mask weights and make their gradients, one or many at a time, by the libraries' pack and post.

The libraries take weights whose rows are dense in memory and thresholds in the dtype of the
arithmetic (float32 or float64). Other tensors are copied first, and results are copied back to the
layout and dtype of the caller's tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference.surrogate import SURROGATES
from ...reference.weight import largest_collapsed_count

_pack = torch.ops.dst_kernels_compiled.pack.default
_post = torch.ops.dst_kernels_compiled.post.default
_CODES = {name: code for code, name in enumerate(SURROGATES)}
_NO_GUARD = -1
_OWN: dict = {}  # masked weights in the weights' own dtype: to name one takes the library longer
_FLOAT32 = {torch.float32}


def effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> Tensor:
    """Do as `reference.effective_threshold`."""
    if reset_ratio is None:
        return threshold.clone()
    return masked_weight(weight, threshold, reset_ratio, torch.bfloat16)[1]


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    reset_ratio: float | None,
    dtype: torch.dtype,
    commit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do as `reference.masked_weight`."""
    if not _are_usual(weight, threshold):
        many = masked_weights([weight], [threshold], [reset_ratio], [commit], dtype)
        return many[0][0], many[1][0]
    settings = _collapsed(weight.numel(), reset_ratio), int(commit)
    other = _OWN if dtype is torch.float32 else {"dtype": dtype}
    (masked,), (effective,) = _pack((weight,), (threshold,), settings, **other)
    return masked, effective


def masked_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Do as `reference.masked_weights`."""
    taken_weights, taken_thresholds = _operands(weights, thresholds)
    targets = None if out is None else _targets(out, weights, taken_weights, dtype)
    sizes = tuple(map(Tensor.numel, weights))
    settings = _pack_settings(sizes, tuple(reset_ratios), tuple(commit))
    usual = taken_weights is weights  # and all are float32
    other = _OWN if usual and dtype is torch.float32 else {"dtype": dtype}
    masked, effective = _pack(taken_weights, taken_thresholds, settings, targets, **other)
    if usual:
        return masked, effective
    for i, weight in enumerate(weights):
        if taken_weights[i] is not weight:
            target = None if out is None else out[i]
            masked[i] = _handed_back(masked[i], weight, target, dtype)
    for i, threshold in enumerate(thresholds):
        if taken_thresholds[i] is not threshold:
            effective[i] = _like(threshold, effective[i])
            if commit[i]:
                threshold.copy_(taken_thresholds[i])
    return masked, effective


@functools.lru_cache(maxsize=256)
def _pack_settings(
    sizes: Sequence[int], reset_ratios: Sequence[float | None], commit: Sequence[bool]
) -> list[int]:
    """Return what the library's pack takes, for every weight one after the other."""
    each = zip(sizes, reset_ratios, commit, strict=True)
    return [
        setting
        for size, ratio, committed in each
        for setting in (_collapsed(size, ratio), int(committed))
    ]


@functools.lru_cache(maxsize=256)
def _post_settings(surrogates: Sequence[str], structure_gradients: Sequence[bool]) -> list[int]:
    """Return what the library's post takes, for every weight one after the other."""
    each = zip(surrogates, structure_gradients, strict=True)
    return [setting for name, structure in each for setting in (_CODES[name], int(structure))]


@functools.lru_cache(maxsize=4096)
def _collapsed(size: int, reset_ratio: float | None) -> int:
    """Return the largest kept count at which the guard resets; _NO_GUARD if it never does."""
    if reset_ratio is None or not size:
        return _NO_GUARD
    return largest_collapsed_count(size, reset_ratio)


def masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do as `reference.masked_weight_backward`."""
    if not (_are_usual(weight, threshold) and grad.is_contiguous()):
        each = [grad], [weight], [threshold], [surrogate], [structure_gradient]
        many = masked_weights_backward(*each)
        return many[0][0], many[1][0]
    settings = _CODES[surrogate], int(structure_gradient)
    (of_weight,), (of_threshold,) = _post((grad,), (weight,), (threshold,), settings)
    return of_weight, of_threshold


def masked_weights_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    surrogates: Sequence[str],
    structure_gradients: Sequence[bool],
    out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Do as `reference.masked_weights_backward`."""
    given, taken = (weights, thresholds), _operands(weights, thresholds)
    taken_weights, taken_thresholds = taken
    taken_grads = grads
    if not (taken_weights is weights and all(map(Tensor.is_contiguous, grads))):
        taken_grads = [_laid_out_as(*pair) for pair in zip(taken_weights, grads, strict=True)]
    settings = _post_settings(tuple(surrogates), tuple(structure_gradients))
    of_weights, of_thresholds = _post(
        taken_grads, taken_weights, taken_thresholds, settings,
        *([] if out is None else map(_targets, out, given, taken)),
    )  # fmt: skip
    if taken_weights is weights:
        return of_weights, of_thresholds
    for i, weight in enumerate(weights):
        if taken_weights[i] is not weight:
            target = None if out is None else out[0][i]
            of_weights[i] = _handed_back(of_weights[i], weight, target)
    for i, threshold in enumerate(thresholds):
        if taken_thresholds[i] is not threshold:
            target = None if out is None else out[1][i]
            of_thresholds[i] = _handed_back(of_thresholds[i], threshold, target)
    return of_weights, of_thresholds


def _targets(
    out: Sequence[Tensor],
    given: Sequence[Tensor],
    taken: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return outputs for the libraries: those of `out` where no copy was needed, else new ones."""
    return [
        target if mine is theirs else torch.empty_like(mine, dtype=dtype)
        for target, theirs, mine in zip(out, given, taken, strict=True)
    ]


def _handed_back(
    made: Tensor, original: Tensor, target: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return `made` in `target`, or (without one) with the layout of `original`."""
    return _like(original, made, dtype) if target is None else target.copy_(made)


def _operands(
    weights: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return both as the libraries take them: the sequences themselves if none needs a copy."""
    tensors = [*weights, *thresholds]
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == _FLOAT32 and all(map(Tensor.is_contiguous, tensors)):
        return weights, thresholds
    taken = [
        pair if _are_usual(*pair) else _converted(*pair)
        for pair in zip(weights, thresholds, strict=True)
    ]
    return [weight for weight, _ in taken], [threshold for _, threshold in taken]


def _are_usual(weight: Tensor, threshold: Tensor) -> bool:
    return (
        (weight.dtype is torch.float32 is threshold.dtype)
        and weight.is_contiguous()
        and threshold.is_contiguous()
    )


def _converted(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    double = torch.float64 in (weight.dtype, threshold.dtype)
    if double:
        weight = weight.to(torch.float64)
    if not _rows_are_dense(weight):
        weight = weight.contiguous()
    arithmetic = torch.float64 if double else torch.float32
    if threshold.shape == weight.shape:
        return weight, _laid_out_as(weight, threshold.to(arithmetic))
    return weight, threshold.to(arithmetic).contiguous()


def _rows_are_dense(weight: Tensor) -> bool:
    if weight.is_contiguous():
        return True
    if weight.numel() == 0:
        return False
    rows = weight.shape[0]
    return torch.ops.aten.is_non_overlapping_and_dense(weight) and (
        rows == 1 or weight.stride(0) == weight.numel() // rows
    )


def _laid_out_as(weight: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with the weight's strides."""
    if tensor.is_contiguous() and weight.is_contiguous():
        return tensor
    return tensor if tensor.stride() == weight.stride() else _like(weight, tensor, tensor.dtype)


def _like(original: Tensor, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy of `tensor` with the layout of `original` and, by default, its dtype."""
    return torch.empty_like(original, dtype=dtype).copy_(tensor)
