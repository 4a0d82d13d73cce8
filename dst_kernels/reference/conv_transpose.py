"""Compute masked transposed convolutions over 1, 2 or 3 spatial dimensions.

The weight is stored as in torch, [in, out/groups, *kernel]. A row is all weights of one output
channel: in/groups * prod(kernel), not adjacent in memory. Viewed by group, [groups,
in/groups, out/groups, *kernel], the thresholds of the output channels expand to the weight's shape.
Masking then works as with one threshold per weight, and no weight is copied.

Inputs are batched and padding is numeric. The product runs in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .conv import torch_reads
from .weight import masked_weight

_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class TransposedGeometry(NamedTuple):
    """Hold the options of a transposed convolution, in the order of torch's functions."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]

    def output_shape(self, input_shape: Sequence[int], weight_shape: Sequence[int]) -> list[int]:
        """Return the output's shape, [N, out, *spatial']."""
        sizes = input_shape[2:], weight_shape[2:], *self[:3], self.dilation
        spatial = [
            (size - 1) * stride - 2 * padding + dilation * (taps - 1) + extra + 1
            for size, taps, stride, padding, extra, dilation in zip(*sizes, strict=True)
        ]
        return [input_shape[0], weight_shape[1] * self.groups, *spatial]


def by_group(weight: Tensor, threshold: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """View the weight as [groups, in/groups, out/groups, *kernel], and the threshold like it.

    A single threshold for the whole weight is returned unchanged.
    """
    shape = threshold.shape
    grouped = weight.unflatten(0, (groups, weight.shape[0] // groups))
    if shape == weight.shape:
        return grouped, threshold.view(grouped.shape)
    if shape.numel() == 1:
        return grouped, threshold
    per_channel = threshold.view(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return grouped, per_channel.expand(grouped.shape)


def not_by_group(grouped: Tensor, like: Tensor) -> Tensor:
    """Undo `by_group` for a threshold: return it in the shape of `like`."""
    if grouped.shape.numel() == like.shape.numel():
        return grouped.view(like.shape)
    if grouped.numel() == 0:
        return like.clone()
    one_per_channel: tuple[Any, ...] = (slice(None), 0, slice(None), *[0] * (grouped.dim() - 3))
    return grouped[one_per_channel].reshape(like.shape)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: TransposedGeometry,
) -> Tensor:
    """Convolve [N, in, *spatial] with [in, out/groups, *kernel] to [N, out, *spatial'], transposed.

    Input and weight share a dtype; the bias [out] may have another.
    """
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    if geometry.groups != 1 and not torch_reads(weight):
        weight = weight.contiguous()
    return _CONV_TRANSPOSE[input.dim()](input, weight, bias, *geometry)


def masked_conv_transpose(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    geometry: TransposedGeometry,
) -> tuple[Tensor, Tensor]:
    """Return (`conv_transpose` with the masked weight, effective threshold).

    `threshold` is [out], [] or [1], or has the weight's shape.
    """
    masked, effective = masked_weight(
        *by_group(weight, threshold, geometry.groups), reset_ratio, input.dtype
    )
    output = conv_transpose(input, masked.flatten(0, 1), bias, geometry)
    return output, not_by_group(effective, threshold)
