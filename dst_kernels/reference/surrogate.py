"""Compute surrogate derivatives H(x) of the step function, whose true derivative is 0 or undefined.

Each function overwrites both arguments and returns `grad` * H(margin), with margin x = |W| - t;
where the margin is NaN, so is the result. They work in place and without boolean tensors, because
on CPUs a fresh buffer or a boolean comparison costs several times the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _long_tailed(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 2 - 4|x| for |x| <= 0.4, by 0.4 up to |x| = 1 inclusive, by 0 beyond.

    Xu & Cheung, BMVC 2019, and Liu et al., ICLR 2020. The slope is 0.4 at |x| = 0.4, so both pieces
    are max(2 - 4|x|, 0.4).
    """
    _zero_beyond_(grad, margin, 1.0)
    return grad.mul_(margin.abs_().mul_(-4).add_(2).clamp_(min=0.4))


def _rectangular(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 1 up to |x| = 1/2 inclusive, by 0 beyond: unit area."""
    _zero_beyond_(grad, margin, 0.5)
    return _straight_through(grad, margin)


def _triangular(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by max(0, 1 - |x|): unit area."""
    return grad.mul_(margin.abs_().neg_().add_(1).clamp_(min=0))


def _straight_through(grad: Tensor, margin: Tensor) -> Tensor:
    """Multiply by 1 everywhere."""
    return grad.mul_(margin.clamp_(1, 1))  # clamp keeps NaN


def _zero_beyond_(grad: Tensor, margin: Tensor, bound: float) -> None:
    """Zero `grad` where |margin| > `bound`, a power of two.

    torch's kernel also zeroes at its limits, hence the next number above the bound.
    """
    limit = bound * (1 + torch.finfo(margin.dtype).eps)
    torch.ops.aten.hardtanh_backward.grad_input(grad, margin, -limit, limit, grad_input=grad)


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
