"""Convolve with masked weights over one, two or three spatial dimensions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .. import autograd
from .layer import MaskedLayer
from .sources import attached_weight, known_of


class MaskedConv(MaskedLayer, nn.modules.conv._ConvNd):
    """Run `torch.nn.{parent}` with only the weights whose magnitude exceeds their threshold.

    Positional arguments, `padding_mode`, `device`, `dtype` and shapes are those of the parent. A
    row is one filter: `weight[i]`, of in/groups * prod(kernel) elements. The keyword-only arguments
    and the errors raised are those of `MaskedLinear`.
    """

    _keeps_rows = True

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is not self._parameters.get("weight", weight):
            return super()._conv_forward(input, weight, bias)  # from a user's own forward
        attached = attached_weight(self, input)
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = self.stride, padding, self.dilation, self.groups
        if attached is not None:
            return autograd.attached_conv(
                input, attached, bias, *geometry, self.masking, known_of(self, attached)
            )
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_conv(
                input, weight, threshold, bias, *geometry, *how
            )
        )


_DOC = MaskedConv.__doc__ or ""  # python -OO drops docstrings


class MaskedConv1d(MaskedConv, nn.Conv1d):
    __doc__ = _DOC.format(parent="Conv1d")
    dense_type = nn.Conv1d


class MaskedConv2d(MaskedConv, nn.Conv2d):
    __doc__ = _DOC.format(parent="Conv2d")
    dense_type = nn.Conv2d


class MaskedConv3d(MaskedConv, nn.Conv3d):
    __doc__ = _DOC.format(parent="Conv3d")
    dense_type = nn.Conv3d
