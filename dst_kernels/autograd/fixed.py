"""Apply a fixed mask to a weight by torch's own operations, which all its transforms support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _WithDenseGradient(Function):
    """Mask the weight, but pass it the gradient of the result unmasked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fixed_weight(weight: Tensor, mask: Tensor, dense_gradient: bool) -> Tensor:
    """Return `weight` where the boolean `mask` is True, else 0, even where the weight is NaN.

    The weight's gradient is 0 where the mask is False; with `dense_gradient` it is the result's.
    """
    if dense_gradient:
        return _WithDenseGradient.apply(weight, mask)
    return torch.where(mask, weight, 0)
