"""Ops on weights alone, one or many at a time, over the libraries' pack and post.

The libraries take weights whose rows are dense in memory, thresholds of the arithmetic's dtype
and outputs that are allocated already. What is not so goes in as a copy, and comes back with the
layout and dtype that the caller's tensors have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.surrogate import SURROGATES
from ..reference.weight import largest_collapsed_count

__all__ = [
    "effective_threshold",
    "masked_weight",
    "masked_weight_backward",
    "masked_weights",
    "masked_weights_backward",
]

_pack = torch.ops.dst_kernels_compiled.pack.default
_post = torch.ops.dst_kernels_compiled.post.default
_CODES = {name: code for code, name in enumerate(SURROGATES)}
_NO_GUARD = -1


def effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> Tensor:
    """As the reference's."""
    if reset_ratio is None:
        return threshold.clone()
    return masked_weight(weight, threshold, reset_ratio, torch.bfloat16)[1]


def masked_weight(
    weight: Tensor, threshold: Tensor, reset_ratio: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    (masked,), (effective,) = masked_weights([weight], [threshold], [reset_ratio], [False], dtype)
    return masked, effective


def masked_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference's."""
    taken = [_operands(*pair) for pair in zip(weights, thresholds, strict=True)]
    masked = [torch.empty_like(weight, dtype=dtype) for weight, _ in taken]
    effective = [torch.empty_like(threshold) for _, threshold in taken]
    settings = []
    for weight, reset_ratio, committed in zip(weights, reset_ratios, commit, strict=True):
        size = weight.numel()
        guarded = reset_ratio is not None and size
        settings.append(largest_collapsed_count(size, reset_ratio) if guarded else _NO_GUARD)
        settings.append(int(committed))
    kept = weights[0].new_empty(len(taken), dtype=torch.int64)
    _pack(*_columns(taken), settings, masked, effective, kept)
    for i, (weight, threshold) in enumerate(taken):
        masked[i] = _like(masked[i], weight, weights[i], dtype)
        effective[i] = _like(effective[i], threshold, thresholds[i], thresholds[i].dtype)
        if commit[i] and threshold is not thresholds[i]:
            thresholds[i].copy_(threshold)
    return masked, effective


def masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    (of_weight,), (of_threshold,) = masked_weights_backward(
        [grad], [weight], [threshold], [surrogate], [structure_gradient]
    )
    return of_weight, of_threshold


def masked_weights_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    surrogates: Sequence[str],
    structure_gradients: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference's."""
    taken = [_operands(*pair) for pair in zip(weights, thresholds, strict=True)]
    given = [_as_laid_out(g, weight) for g, (weight, _) in zip(grads, taken, strict=True)]
    of_weights = [torch.empty_like(weight) for weight, _ in taken]
    of_thresholds = [torch.empty_like(threshold) for _, threshold in taken]
    settings = []
    for surrogate, structure in zip(surrogates, structure_gradients, strict=True):
        settings += _CODES[surrogate], int(structure)
    _post(given, *_columns(taken), settings, of_weights, of_thresholds)
    for i, (weight, threshold) in enumerate(taken):
        of_weights[i] = _like(of_weights[i], weight, weights[i], weights[i].dtype)
        of_thresholds[i] = _like(of_thresholds[i], threshold, thresholds[i], thresholds[i].dtype)
    return of_weights, of_thresholds


def _columns(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _operands(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the libraries take them: themselves where they are so."""
    usual = weight.dtype is torch.float32 is threshold.dtype
    if usual and weight.is_contiguous() and threshold.is_contiguous():
        return weight, threshold  # decided quickly
    double = torch.float64 in (weight.dtype, threshold.dtype)
    if double and weight.dtype != torch.float64:
        weight = weight.to(torch.float64)
    if not _rows_are_dense(weight):
        weight = weight.contiguous()
    real = torch.float64 if double else torch.float32
    if threshold.shape == weight.shape:
        return weight, _as_laid_out(threshold.to(real), weight)
    return weight, threshold.to(real).contiguous()


def _rows_are_dense(weight: Tensor) -> bool:
    if weight.is_contiguous():
        return True
    if weight.numel() == 0:
        return False
    rows = weight.shape[0]
    return torch.ops.aten.is_non_overlapping_and_dense(weight) and (
        rows == 1 or weight.stride(0) == weight.numel() // rows
    )


def _as_laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """`tensor` with the weight's strides."""
    if tensor.is_contiguous() and weight.is_contiguous():
        return tensor
    if tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def _like(made: Tensor, source: Tensor, original: Tensor, dtype: torch.dtype) -> Tensor:
    """What was made beside `source`, as if beside the `original` that it stands for."""
    if source is original:
        return made
    return torch.empty_like(original, dtype=dtype).copy_(made)
