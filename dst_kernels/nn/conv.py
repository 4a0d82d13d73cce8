"""Masked convolutions over one, two and three spatial dimensions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .. import autograd
from .layer import MaskedLayer
from .sources.group import attached_weight

__all__ = ["MaskedConv1d", "MaskedConv2d", "MaskedConv3d"]


class _MaskedConv(MaskedLayer):
    """`torch.nn.{parent}` that computes with the weights whose magnitude exceeds their threshold.

    Positional arguments, `padding_mode`, `device` and `dtype` as in the parent. A row is one
    filter: `weight[i]`, of in/groups * prod(kernel) elements. The keyword-only arguments and the
    errors raised are those of `MaskedLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        granularity: str = "row",
        reset_ratio: float | None = 0.01,
        surrogate: str = "long_tailed",
        structure_gradient: bool = True,
        backend: str = "auto",
        path: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._init_masking(granularity, reset_ratio, surrogate, structure_gradient, backend, path)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        attached = attached_weight(self, input)
        if attached is not None:
            return super()._conv_forward(input, attached, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = self.stride, padding, self.dilation, self.groups
        return self._masked(autograd.masked_conv, input, bias, *geometry)


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    __doc__ = _MaskedConv.__doc__.format(parent="Conv1d")
    dense_type = nn.Conv1d


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    __doc__ = _MaskedConv.__doc__.format(parent="Conv2d")
    dense_type = nn.Conv2d


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    __doc__ = _MaskedConv.__doc__.format(parent="Conv3d")
    dense_type = nn.Conv3d
