"""What we measure ourselves against, in our own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "AuthorsConv2d",
    "AuthorsLinear",
    "BranchFreeConv2d",
    "BranchFreeLinear",
    "MaskedBaseline",
    "authors_masked_weight",
    "authors_regularization",
    "branch_free_masked_weight",
    "branch_free_threshold",
    "surrogate",
    "with_authors_layers_",
    "with_branch_free_layers_",
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
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (margin,) = ctx.saved_tensors
        return grad * surrogate(margin)


def _by_row(threshold: Tensor, weight: Tensor) -> Tensor:
    return threshold.view(-1, *[1] * (weight.dim() - 1))


def _mask(weight: Tensor, threshold: Tensor) -> Tensor:
    return _BinaryStep.apply(weight.abs() - _by_row(threshold, weight)).to(weight.dtype)


def authors_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """weight [N, ...] * mask for threshold [N]; the host decides whether thresholds are zeroed."""
    mask = _mask(weight, threshold)
    if mask.sum() / mask.numel() <= _RESET_RATIO:
        with torch.no_grad():
            threshold.zero_()
        mask = _mask(weight, threshold)
    return weight * mask


def branch_free_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """The same decision without the host: the threshold, or zeros through which gradients flow."""
    pruning = _by_row(threshold.detach(), weight)
    kept = (weight.detach().abs() > pruning).sum(dtype=torch.float32)
    reset = kept / weight.numel() <= _RESET_RATIO
    return threshold + torch.where(reset, -threshold, torch.zeros_like(threshold)).detach()


def branch_free_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """As `authors_masked_weight` in one graph; a reset is not written back."""
    return weight * _mask(weight, branch_free_threshold(weight, threshold))


class MaskedBaseline:
    """Goes before a `torch.nn` layer.

    Thresholds are at least float32, so that every provider prunes the same weights in any dtype.
    """

    masked_weight: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_threshold_()

    def add_threshold_(self) -> None:
        """Zeros, one for each row of every weight."""
        for name in self.weight_names():
            weight = getattr(self, name)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            threshold = nn.Parameter(weight.new_zeros(weight.shape[0], dtype=dtype))
            setattr(self, name.replace("weight", "threshold"), threshold)

    def weight_names(self) -> list[str]:
        return ["weight"]

    def thresholds(self) -> list[Tensor]:
        return [getattr(self, name.replace("weight", "threshold")) for name in self.weight_names()]

    def _masked(self) -> Tensor:
        return type(self).masked_weight(self.weight, self.threshold)


class _Linear(MaskedBaseline, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._masked(), self.bias)


class _Conv2d(MaskedBaseline, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._masked(), self.bias)


class AuthorsLinear(_Linear):
    """The paper's layer as its authors run it: eager autograd and a host decision per forward."""

    masked_weight = staticmethod(authors_masked_weight)


class AuthorsConv2d(_Conv2d):
    """As `AuthorsLinear`, one threshold per filter."""

    masked_weight = staticmethod(authors_masked_weight)


class BranchFreeLinear(_Linear):
    """The paper's layer with the decision on the device, which torch.compile can take whole."""

    masked_weight = staticmethod(branch_free_masked_weight)


class BranchFreeConv2d(_Conv2d):
    """As `BranchFreeLinear`, one threshold per filter."""

    masked_weight = staticmethod(branch_free_masked_weight)


def with_authors_layers_(model: nn.Module) -> nn.Module:
    """The model with its layers as the authors would run them."""
    from .recurrent_baselines import AuthorsLSTM

    types = {nn.Linear: AuthorsLinear, nn.Conv2d: AuthorsConv2d, nn.LSTM: AuthorsLSTM}
    return _convert_(model, types)


def with_branch_free_layers_(model: nn.Module) -> nn.Module:
    """The same for `BranchFreeLinear` and its kin."""
    from .recurrent_baselines import BranchFreeLSTM

    types = {nn.Linear: BranchFreeLinear, nn.Conv2d: BranchFreeConv2d, nn.LSTM: BranchFreeLSTM}
    return _convert_(model, types)


def _convert_(model: nn.Module, types: dict[type[nn.Module], type[MaskedBaseline]]) -> nn.Module:
    """In place. A head that shares its weight with an embedding stays dense."""
    shared = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for layer in model.modules():
        if type(layer) in types and id(getattr(layer, "weight", None)) not in shared:
            layer.__class__ = types[type(layer)]
            layer.add_threshold_()
    return model


def authors_regularization(model: nn.Module) -> Tensor:
    """Layer by layer, as there."""
    return sum(
        torch.exp(-threshold).sum()
        for layer in model.modules()
        if isinstance(layer, MaskedBaseline)
        for threshold in layer.thresholds()
    )
