"""Surrogate derivatives H(x) of the step function, which has none of its own.

Each function overwrites both arguments and returns `grad` * H(margin), with margin x = |W| - t;
where the margin is NaN, so is the result. In place and without boolean tensors, because on CPUs a
fresh buffer or a boolean comparison costs several times the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _long_tailed(grad: Tensor, margin: Tensor) -> Tensor:
    """2 - 4|x| up to 0.4, then 0.4 up to 1 inclusive, then 0 (Xu & Cheung, BMVC 2019; the paper).

    The slope meets the tail at 0.4, so both pieces are one maximum.
    """
    _zero_beyond_(grad, margin, 1.0)
    return grad.mul_(margin.abs_().mul_(-4).add_(2).clamp_(min=0.4))


def _rectangular(grad: Tensor, margin: Tensor) -> Tensor:
    """1 up to |x| = 1/2 inclusive, then 0: unit area."""
    _zero_beyond_(grad, margin, 0.5)
    return _straight_through(grad, margin)


def _triangular(grad: Tensor, margin: Tensor) -> Tensor:
    """max(0, 1 - |x|): unit area."""
    return grad.mul_(margin.abs_().neg_().add_(1).clamp_(min=0))


def _straight_through(grad: Tensor, margin: Tensor) -> Tensor:
    """1 everywhere."""
    return grad.mul_(margin.clamp_(1, 1))  # which leaves a NaN


def _zero_beyond_(grad: Tensor, margin: Tensor, bound: float) -> None:
    """Zero `grad` where |margin| > `bound`, a power of two.

    torch's kernel zeroes from its limits on, hence the next number above the bound.
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
    """`grad` * H(`margin`), written into `grad`; `margin` is overwritten too."""
    return _TIMES[surrogate](grad, margin)
