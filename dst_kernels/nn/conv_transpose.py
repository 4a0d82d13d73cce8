"""Convolve, transposed, with masked weights over one, two or three spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import autograd
from ..plan import CONV_TRANSPOSE_PATHS
from .layer import MaskedLayer


class _MaskedConvTranspose(MaskedLayer, nn.modules.conv._ConvTransposeNd):
    """Run `torch.nn.{parent}` with only the weights whose magnitude exceeds their threshold.

    Positional arguments, `padding_mode`, `device`, `dtype`, shapes and the forward's `output_size`
    are those of the parent. A row is one output channel: `weight[:, i]` of its group, in/groups *
    prod(kernel) elements. The keyword-only arguments and the errors raised are those of
    `MaskedLinear`, but `path` is "auto" or "packed", which are the same here.
    """

    accepted_paths = CONV_TRANSPOSE_PATHS
    rows_first = False  # operations take the weight as it is stored: rows first would be a copy

    def _rows(self, tensor: Tensor) -> Tensor:
        """Turn [in, out/groups, *kernel] into [out, in/groups, *kernel], or back."""
        if tensor.dim() == 1:
            return tensor
        by_group = tensor.unflatten(0, (self.groups, tensor.shape[0] // self.groups))
        return by_group.transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        own: Any = self  # torch's annotations say lists for tuples, and allow strings as padding
        output_padding = own._output_padding(
            input,
            output_size,
            own.stride,
            own.padding,
            own.kernel_size,
            own.weight.dim() - 2,
            own.dilation,
        )
        geometry = own.stride, own.padding, output_padding, own.groups, own.dilation
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_conv_transpose(
                input, weight, threshold, self.bias, *geometry, *how
            )
        )

    def _weight_to_compute_with(self, name: str, weight: Tensor) -> Tensor:
        dtype = weight.dtype
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_conv_transpose_weight(
                weight, threshold, self.groups, how[0], dtype, how[1]
            )
        )


_DOC = _MaskedConvTranspose.__doc__ or ""  # python -OO drops docstrings


class MaskedConvTranspose1d(_MaskedConvTranspose, nn.ConvTranspose1d):
    __doc__ = _DOC.format(parent="ConvTranspose1d")
    dense_type = nn.ConvTranspose1d


class MaskedConvTranspose2d(_MaskedConvTranspose, nn.ConvTranspose2d):
    __doc__ = _DOC.format(parent="ConvTranspose2d")
    dense_type = nn.ConvTranspose2d


class MaskedConvTranspose3d(_MaskedConvTranspose, nn.ConvTranspose3d):
    __doc__ = _DOC.format(parent="ConvTranspose3d")
    dense_type = nn.ConvTranspose3d
