"""Compiled DST whose mask is forced into the prologue of the matrix product.

Inductor refuses to fuse a mask into a product's operand: its heuristic calls a prologue that reads
more than it writes unprofitable. A subgraph under InvokeQuant is exempt. Its higher-order op has no
usable derivative for this, so the backward is spelled out.

InvokeQuant is private to torch: where it is gone, importing this module fails with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import InvokeQuant
from torch.autograd import Function

from .baselines import BranchFreeLinear, branch_free_threshold, surrogate

__all__ = ["ForcedPrologueLinear"]


def _masked(weight: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    def prologue(weight: Tensor, threshold: Tensor) -> Tensor:
        kept = weight.abs() > threshold.view(-1, 1)
        return torch.where(kept, weight, torch.zeros_like(weight)).to(dtype)

    return InvokeQuant()(prologue, weight, threshold)


class _Product(Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight, threshold)
        product = input @ _masked(weight, threshold, input.dtype).t()
        return product + bias.to(input.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        input, weight, threshold = ctx.saved_tensors
        grad_input = grad @ _masked(weight, threshold, input.dtype)
        raw = (grad.t() @ input).to(weight.dtype)
        margin = weight.abs() - threshold.view(-1, 1)
        slope = raw * surrogate(margin)
        zero = torch.zeros_like(raw)
        grad_weight = torch.where(margin > 0, raw, zero) + slope * weight.abs()
        grad_threshold = -(slope * weight).sum(1)
        return (
            grad_input,
            grad_weight.to(weight.dtype),
            grad_threshold,
            grad.sum(0).to(weight.dtype),
        )


class ForcedPrologueLinear(BranchFreeLinear):
    """`BranchFreeLinear` for torch.compile, with the mask inside both products that read W."""

    def forward(self, input: Tensor) -> Tensor:
        threshold = branch_free_threshold(self.weight, self.threshold)
        return _Product.apply(input, self.weight, threshold, self.bias)
