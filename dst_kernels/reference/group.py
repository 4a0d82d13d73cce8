"""Mask many weights, and make many weights' gradients, one after the other.

Backends without a multi-tensor launch reuse these loops: they pass their own function for one
weight as a keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import weight as one


def masked_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
    *,
    masked_weight: Callable = one.masked_weight,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every W * M in `dtype`, and every effective threshold.

    Where `commit` is true, the effective threshold is also written into the threshold. `out`:
    tensors of `dtype` with the weights' strides to write W * M into.
    """
    pairs = [
        masked_weight(weight, threshold, ratio, dtype)
        for weight, threshold, ratio in zip(weights, thresholds, reset_ratios, strict=True)
    ]
    for threshold, (_, effective), wanted in zip(thresholds, pairs, commit, strict=True):
        if wanted:
            threshold.copy_(effective)
    masked, effective = [each for each, _ in pairs], [each for _, each in pairs]
    return masked if out is None else _written(out, masked), effective


def masked_weights_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    surrogates: Sequence[str],
    structure_gradients: Sequence[bool],
    out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    *,
    masked_weight_backward: Callable = one.masked_weight_backward,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every dW and every dt from the gradients G of W * M.

    `out`: tensors like weights and thresholds to write them into.
    """
    arguments = zip(grads, weights, thresholds, surrogates, structure_gradients, strict=True)
    pairs = [masked_weight_backward(*each) for each in arguments]
    of_weights, of_thresholds = [each for each, _ in pairs], [each for _, each in pairs]
    if out is None:
        return of_weights, of_thresholds
    return _written(out[0], of_weights), _written(out[1], of_thresholds)


def _written(out: Sequence[Tensor], made: Sequence[Tensor]) -> list[Tensor]:
    return [target.copy_(source) for target, source in zip(out, made, strict=True)]
