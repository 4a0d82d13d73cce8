"""Surrogate derivatives H(x) of the step function, which has none of its own.

Each takes the margin x = |W| - t and may overwrite it: callers hand in a temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SURROGATES", "surrogate_derivative"]


def _long_tailed(x: Tensor) -> Tensor:
    """2 - 4|x| up to 0.4, then 0.4 up to 1 inclusive, then 0 (Xu & Cheung, BMVC 2019; the paper).

    The slope meets the tail at 0.4, so both pieces are one maximum.
    """
    x = x.abs_()
    inside = x <= 1
    return torch.rsub(x, 2, alpha=4).clamp_(min=0.4).mul_(inside)


def _rectangular(x: Tensor) -> Tensor:
    """1 for |x| <= 1/2, else 0: unit area."""
    return _keep_nan(x.abs_(), x <= 0.5)


def _triangular(x: Tensor) -> Tensor:
    """max(0, 1 - |x|): unit area."""
    return torch.rsub(x.abs_(), 1).clamp_(min=0)


def _straight_through(x: Tensor) -> Tensor:
    """1 everywhere."""
    return _keep_nan(x, torch.ones_like(x, dtype=torch.bool))


def _keep_nan(x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, inside.to(x.dtype))


_DERIVATIVES = {
    "long_tailed": _long_tailed,
    "rectangular": _rectangular,
    "triangular": _triangular,
    "straight_through": _straight_through,
}

SURROGATES = tuple(_DERIVATIVES)


def surrogate_derivative(margin: Tensor, surrogate: str) -> Tensor:
    """H(margin), same shape and dtype; NaN stays NaN. `margin` itself is left alone."""
    return _DERIVATIVES[surrogate](margin.clone())
