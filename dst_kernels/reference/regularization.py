"""Compute the sparse regulariser: the sum of exp(-t) over thresholds, which pushes t upwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# exp(-t) overflows fp32 at t = -88.7, and a sum over many thresholds sooner. Below t = -64 the
# tangent at -64 replaces it: value and gradient stay finite, and the gradient still raises t.
# Elsewhere, which is where training takes place, the result is exp(-t) to the last bit.
LINEAR_BEYOND = 64.0


def sparse_regularization(threshold: Tensor) -> Tensor:
    """Return sum(exp(-t)) as a 0-dim tensor in at least fp32; autograd differentiates it."""
    return sparse_regularization_and_slope(threshold)[0]


def sparse_regularization_and_slope(threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and its derivative by each t: -exp(-t), constant below -LINEAR_BEYOND."""
    threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
    negated = -threshold.clamp(max=1000.0)  # exp(-1000) is 0, and inf - inf never arises
    exponent = negated.clamp(max=LINEAR_BEYOND)
    exponential = exponent.exp()
    return (exponential * (1 + (negated - exponent))).sum(), -exponential


def regularization(thresholds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum over all thresholds, and the derivatives by all elements in one row."""
    return sparse_regularization_and_slope(torch.cat([each.reshape(-1) for each in thresholds]))
