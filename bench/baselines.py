"""What we measure ourselves against, in our own words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "AuthorsLinear",
    "BranchFreeLinear",
    "authors_masked_weight",
    "authors_regularization",
    "branch_free_masked_weight",
    "branch_free_threshold",
    "lenet_300_100",
    "surrogate",
]

_RESET_RATIO = 0.01


def surrogate(margin: Tensor) -> Tensor:
    """The paper's derivative of the step, at margin = |W| - t."""
    distance = margin.abs()
    slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.full_like(distance, 0.4))
    return torch.where(distance > 1, torch.zeros_like(slope), slope)


class _BinaryStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, margin: Tensor) -> Tensor:
        ctx.save_for_backward(margin)
        return (margin > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (margin,) = ctx.saved_tensors
        return grad * surrogate(margin)


def _mask(weight: Tensor, threshold: Tensor) -> Tensor:
    return _BinaryStep.apply(weight.abs() - threshold.view(-1, 1)).to(weight.dtype)


def authors_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """weight [N, K] * mask for threshold [N]; the host decides whether thresholds are zeroed."""
    mask = _mask(weight, threshold)
    if mask.sum() / mask.numel() <= _RESET_RATIO:
        with torch.no_grad():
            threshold.zero_()
        mask = _mask(weight, threshold)
    return weight * mask


def branch_free_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """The same decision without the host: the threshold, or zeros through which gradients flow."""
    kept = (weight.detach().abs() > threshold.detach().view(-1, 1)).sum(dtype=torch.float32)
    reset = kept / weight.numel() <= _RESET_RATIO
    return threshold + torch.where(reset, -threshold, torch.zeros_like(threshold)).detach()


def branch_free_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """As `authors_masked_weight` in one graph; a reset is not written back."""
    return weight * _mask(weight, branch_free_threshold(weight, threshold))


class _MaskedBaseline(nn.Linear):
    """Thresholds stay float32, so that every provider prunes the same weights in any dtype."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.threshold = nn.Parameter(torch.zeros(out_features, device=device))


class AuthorsLinear(_MaskedBaseline):
    """The paper's layer as its authors run it: eager autograd and a host decision per forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, authors_masked_weight(self.weight, self.threshold), self.bias)


class BranchFreeLinear(_MaskedBaseline):
    """The paper's layer with the decision on the device, which torch.compile can take whole."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, branch_free_masked_weight(self.weight, self.threshold), self.bias)


def authors_regularization(model: nn.Module) -> Tensor:
    """Layer by layer, as there."""
    layers = [module for module in model.modules() if isinstance(module, _MaskedBaseline)]
    return sum(torch.exp(-layer.threshold).sum() for layer in layers)


def lenet_300_100(linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """784-300-100-10 with ReLU between."""
    return nn.Sequential(linear(784, 300), nn.ReLU(), linear(300, 100), nn.ReLU(), linear(100, 10))
