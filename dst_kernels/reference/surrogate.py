"""Compute surrogate derivatives H(x) of the step function, whose true derivative is 0 or undefined.

Each function overwrites both arguments and returns `grad` * H(margin), with margin x = |W| - t;
where the margin is NaN, so is the result. H is a factor like any other: where it is 0, a gradient
that is NaN or infinite gives NaN, so that no backend hides a diverged gradient. They work without
boolean tensors, and mostly in place, because on CPUs a fresh buffer or a boolean comparison costs
several times the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _long_tailed(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 2 - 4|x| for |x| <= 0.4, by 0.4 up to |x| = 1 inclusive, by 0 beyond.

    Xu & Cheung, BMVC 2019, and Liu et al., ICLR 2020. The slope is 0.4 at |x| = 0.4, so both pieces
    are max(2 - 4|x|, 0.4).
    """
    _times_zero_beyond_(grad, margin, 1.0)
    return grad.mul_(margin.abs_().mul_(-4).add_(2).clamp_(min=0.4))


def _rectangular(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 1 up to |x| = 1/2 inclusive, by 0 beyond: unit area."""
    _times_zero_beyond_(grad, margin, 0.5)
    return _straight_through(grad, margin)


def _triangular(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by max(0, 1 - |x|): unit area."""
    return grad.mul_(margin.abs_().neg_().add_(1).clamp_(min=0))


def _straight_through(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 1 everywhere."""
    return grad.mul_(margin.clamp_(1, 1))  # clamp keeps NaN


def _times_zero_beyond_(grad: Tensor, margin: Tensor, bound: float) -> None:
    """Multiply by 0 where |margin| > `bound`, a power of two, and by 1 elsewhere.

    torch's kernel also zeroes at its limits, hence the next number above the bound.
    """
    limit = bound * (1 + torch.finfo(margin.dtype).eps)
    one = margin.new_ones(()).expand(margin.shape)
    grad.mul_(torch.ops.aten.hardtanh_backward(one, margin, -limit, limit))


_TIMES = {
    "long_tailed": _long_tailed,
    "rectangular": _rectangular,
    "triangular": _triangular,
    "straight_through": _straight_through,
}

SURROGATES = tuple(_TIMES)


def times_surrogate_(grad: Tensor, margin: Tensor, surrogate: str) -> Tensor:
    """Write `grad` * H(`margin`) into `grad` and return it; `margin` is overwritten too."""
    return _TIMES[surrogate](grad, margin)
