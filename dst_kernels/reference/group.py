"""The weight-side operations for many weights at once: here simply one after the other.

So they are with every backend that has no launch for many; the keywords name its own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import weight as one

__all__ = ["masked_weights", "masked_weights_backward"]


def masked_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
    *,
    masked_weight: Callable = one.masked_weight,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every (W * M, effective threshold); where `commit`, a reset is written into the threshold."""
    pairs = [
        masked_weight(weight, threshold, ratio, dtype)
        for weight, threshold, ratio in zip(weights, thresholds, reset_ratios, strict=True)
    ]
    for threshold, (_, effective), wanted in zip(thresholds, pairs, commit, strict=True):
        if wanted:
            threshold.copy_(effective)
    return [masked for masked, _ in pairs], [effective for _, effective in pairs]


def masked_weights_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    surrogates: Sequence[str],
    structure_gradients: Sequence[bool],
    *,
    masked_weight_backward: Callable = one.masked_weight_backward,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every (dW, dt) from G."""
    arguments = zip(grads, weights, thresholds, surrogates, structure_gradients, strict=True)
    pairs = [masked_weight_backward(*each) for each in arguments]
    return [of_weight for of_weight, _ in pairs], [of_threshold for _, of_threshold in pairs]
