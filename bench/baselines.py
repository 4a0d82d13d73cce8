"""What we measure ourselves against, in our own words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AuthorsLinear", "authors_regularization", "lenet_300_100"]


class _BinaryStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, margin: Tensor) -> Tensor:
        ctx.save_for_backward(margin)
        return (margin > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (margin,) = ctx.saved_tensors
        distance = margin.abs()
        slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.full_like(distance, 0.4))
        return grad * torch.where(distance > 1, torch.zeros_like(slope), slope)


class AuthorsLinear(nn.Linear):
    """The paper's layer as its authors run it: eager autograd and a host decision per forward."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.threshold = nn.Parameter(torch.zeros(out_features))

    def _mask(self) -> Tensor:
        return _BinaryStep.apply(self.weight.abs() - self.threshold.view(-1, 1))

    def forward(self, input: Tensor) -> Tensor:
        mask = self._mask()
        if mask.sum() / mask.numel() <= 0.01:
            with torch.no_grad():
                self.threshold.zero_()
            mask = self._mask()
        return F.linear(input, self.weight * mask, self.bias)


def authors_regularization(model: nn.Module) -> Tensor:
    """Layer by layer, as there."""
    layers = [module for module in model.modules() if isinstance(module, AuthorsLinear)]
    return sum(torch.exp(-layer.threshold).sum() for layer in layers)


def lenet_300_100(linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """784-300-100-10 with ReLU between."""
    return nn.Sequential(linear(784, 300), nn.ReLU(), linear(300, 100), nn.ReLU(), linear(100, 10))
