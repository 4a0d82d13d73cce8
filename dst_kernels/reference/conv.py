"""Compute masked convolutions over 1, 2 or 3 spatial dimensions, and their gradients.

Inputs are batched and padding is numeric: the callers resolve everything else. The product runs in
the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .weight import masked_weight, weight_gradients_


class Geometry(NamedTuple):
    """Hold a convolution's stride, padding and dilation (an integer per dimension), and groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def output_shape(self, input_shape: Sequence[int], weight_shape: Sequence[int]) -> list[int]:
        """Return the output's shape, [N, out, *spatial']."""
        each = zip(input_shape[2:], weight_shape[2:], *self[:3], strict=True)
        spatial = [
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in each
        ]
        return [input_shape[0], weight_shape[0], *spatial]


TORCH_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def conv_memory_format(activation: Tensor, weight: Tensor) -> torch.memory_format:
    """Return channels last where the activation or the weight has it, else contiguous.

    One rule for all backends, so that real and fake results agree.
    """
    channels_last = _CHANNELS_LAST.get(activation.dim())
    if channels_last is not None:
        for tensor in (activation, weight):
            if tensor.is_contiguous(memory_format=channels_last) and not tensor.is_contiguous():
                return channels_last
    return torch.contiguous_format


def torch_reads(kernel: Tensor) -> bool:
    """Return whether torch's convolutions work with a kernel of this layout; nearly all do.

    On CPUs torch's grouped convolutions recognise a channels-last kernel by the strides of its
    dimensions of more than one element, but then use all strides: dimensions of one element must
    also have the stride that torch would give them. With layouts between contiguous and channels
    last, torch refuses to compute some gradients.
    """
    if kernel.is_contiguous():
        return True
    step = 1
    for axis in (1, *range(kernel.dim() - 1, 1, -1), 0):
        if kernel.stride(axis) != step:
            return False
        step *= kernel.shape[axis]
    return True


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Convolve [N, in, *spatial] with [out, in/groups, *kernel] to [N, out, *spatial'].

    Input and weight share a dtype; the bias [out] may have another.
    """
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    if geometry[3] != 1 and not torch_reads(weight):
        weight = weight.contiguous()
    return TORCH_CONVS[input.dim()](input, weight, bias, *geometry)


def conv_grad_input(
    grad: Tensor,
    like: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Return dX, shaped like the input `like`, of which only shape and strides are used."""
    return convolution_backward(grad, like, weight, geometry, 0)


def conv_dense_weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Return G, shaped like `weight`, of which only shape and strides are used."""
    shaped_like_weight = torch.empty_like(weight, dtype=grad.dtype)
    return convolution_backward(grad, input, shaped_like_weight, geometry, 1)


def masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Return (`conv` with the masked weight, effective threshold)."""
    masked, effective = masked_weight(weight, threshold, reset_ratio, input.dtype)
    output = conv(input, masked, bias, geometry)
    return output.contiguous(memory_format=conv_memory_format(input, weight)), effective


def masked_conv_grad_input(
    grad: Tensor,
    input_shape: Sequence[int],
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Return dX of shape `input_shape`, in the gradient's dtype."""
    masked, _ = masked_weight(weight, threshold, None, grad.dtype)
    memory_format = conv_memory_format(grad, weight)
    like = torch.empty(
        input_shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format
    )
    dense = conv_grad_input(grad, like, masked, geometry)
    return dense.contiguous(memory_format=memory_format)


def masked_conv_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
    surrogate: str,
    structure_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dW, dt), with G the dense weight gradient."""
    dense = conv_dense_weight_gradient(grad, input, weight, geometry)
    return weight_gradients_(dense, weight, threshold, surrogate, structure_gradient)


def convolution_backward(
    grad: Tensor, input: Tensor, kernel: Tensor, geometry: Geometry, which: int
) -> Tensor:
    """Return the gradient of the input (which=0) or of the kernel (which=1)."""
    kernel = kernel if torch_reads(kernel) else kernel.contiguous()
    of = *geometry[:3], False, [0] * len(geometry.stride), geometry.groups
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, input, kernel, None, *of, wanted)[which]
