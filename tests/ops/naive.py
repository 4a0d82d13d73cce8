"""The formulas of the method, one number at a time: slow, and too plain to be wrong.

mask = 1 where |w| > t        dw = g * mask + g * |w| * H(|w| - t)        dt = -sum g * w * H
"""

from __future__ import annotations

import torch
from torch import Tensor


def long_tailed(x: float) -> float:
    x = abs(x)
    if x <= 0.4:
        return 2.0 - 4.0 * x
    return 0.4 if x <= 1.0 else 0.0


def rectangular(x: float) -> float:
    return 1.0 if abs(x) <= 0.5 else 0.0


def triangular(x: float) -> float:
    return 1.0 - abs(x) if abs(x) <= 1.0 else 0.0


def straight_through(x: float) -> float:
    return 1.0


SURROGATES = {
    "long_tailed": long_tailed,
    "rectangular": rectangular,
    "triangular": triangular,
    "straight_through": straight_through,
}


def spread(threshold: Tensor, shape) -> Tensor:
    """The threshold of every single weight, in float64."""
    threshold = threshold.detach().double()
    if threshold.numel() == 1 and threshold.dim() <= 1:
        return threshold.reshape(()).expand(shape)
    if threshold.dim() == 1:
        return threshold.reshape(shape[0], *[1] * (len(shape) - 1)).expand(shape)
    return threshold


def mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """What is kept, as a boolean tensor; both arguments compared as the numbers they are."""
    return weight.detach().double().abs() > spread(threshold, weight.shape)


def gradients(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor,
    surrogate: str = "long_tailed",
    structure_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """(dw, dt) in float64, in the shapes of weight and threshold."""
    derivative = SURROGATES[surrogate]
    limits = spread(threshold, weight.shape).flatten().tolist()
    of_weight, of_threshold = [], []
    for g, w, t in zip(
        grad.double().flatten().tolist(),
        weight.detach().double().flatten().tolist(),
        limits,
        strict=True,
    ):
        margin = abs(w) - t
        height = derivative(margin)
        kept = g if margin > 0 else 0.0
        of_weight.append(kept + (g * abs(w) * height if structure_gradient else 0.0))
        of_threshold.append(-g * w * height)
    of_weight = torch.tensor(of_weight, dtype=torch.float64).reshape(weight.shape)
    of_threshold = torch.tensor(of_threshold, dtype=torch.float64).reshape(weight.shape)
    if threshold.shape == weight.shape:
        return of_weight, of_threshold
    if threshold.numel() == 1:
        return of_weight, of_threshold.sum().reshape(threshold.shape)
    return of_weight, of_threshold.sum(tuple(range(1, weight.dim())))
