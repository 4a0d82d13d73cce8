"""The sparse regulariser: the sum of exp(-t) over thresholds, which pushes every t upwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# exp(-t) overflows fp32 at t = -88.7, and a sum over many thresholds sooner. From t = -64 downwards
# the function goes on along its tangent: value and gradient stay finite and the gradient keeps
# pulling t back up. At any t a training run can recover from, this is exp(-t) to the last bit.
LINEAR_BEYOND = 64.0


def sparse_regularization(threshold: Tensor) -> Tensor:
    """sum(exp(-t)) as a 0-dim tensor in at least fp32. Plain autograd gives its true gradient."""
    return sparse_regularization_and_slope(threshold)[0]


def sparse_regularization_and_slope(threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its derivative by each threshold: -exp(-t), constant below -LINEAR_BEYOND."""
    threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
    negated = -threshold.clamp(max=1000.0)  # exp(-1000) is 0, and inf - inf never arises
    exponent = negated.clamp(max=LINEAR_BEYOND)
    exponential = exponent.exp()
    return (exponential * (1 + (negated - exponent))).sum(), -exponential


def regularization(thresholds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum over all elements of all thresholds, and the slope by each of them in one row."""
    return sparse_regularization_and_slope(torch.cat([each.reshape(-1) for each in thresholds]))
