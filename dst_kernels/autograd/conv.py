"""Convolve with a masked weight, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..backends.device import gpu_name, tf32_allowed
from ..ops.conv_checks import check_conv
from ..ops.geometry import per_dimension, resolve_padding
from ..plan import ConvKind, Plan, plan_conv
from ..reference.conv import (
    TORCH_CONVS,
    Geometry,
    conv,
    conv_dense_weight_gradient,
    conv_grad_input,
)
from .kept import MaskedWeightInMemory, multiply, never_kept
from .options import MaskOptions
from .product import Product, masked_product
from .weight import FRESH, WeightSource


def conv_grad_bias(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over all dimensions except the channels', added in at least float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum((0, *range(2, grad.dim())), dtype=wide).to(dtype)


class _Conv(Product):
    multiply = forward = staticmethod(conv)
    grad_input = staticmethod(conv_grad_input)
    dense_gradient = staticmethod(conv_dense_weight_gradient)
    grad_bias = staticmethod(conv_grad_bias)
    kept_forward, kept_grad_input = "kept_conv", "kept_conv_grad_input"
    kept_grad_weight = "kept_conv_grad_weight"
    fused_forward = ops.masked_conv
    fused_grad_input = ops.masked_conv_grad_input
    fused_grad_weight = ops.masked_conv_grad_weight

    @staticmethod
    def sizes(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int, int, str]:
        rows, *row = weight.shape
        kind = "conv1x1" if row[1:].count(1) == len(row) - 1 else "conv"
        # The kernels take contiguous images: others would have to be copied, and back.
        positions = 0
        if input.is_contiguous():
            shape = geometry.output_shape(input.shape, weight.shape)
            positions = math.prod((shape[0], *shape[2:]))
        return positions, rows, math.prod(row), kind

    @staticmethod
    def fastest(input: Tensor, weight: Tensor, packed_available: bool, geometry: Geometry) -> Plan:
        stride, padding, _, groups = geometry
        shape = geometry.output_shape(input.shape, weight.shape)
        channels, per_group, *kernel = weight.shape
        pointwise = not any(padding) and all(n == 1 for n in (*kernel, *stride, groups))
        return plan_conv(
            math.prod((shape[0], *shape[2:])),
            channels,
            per_group,
            input.dtype,
            weight.dtype,
            ConvKind(tuple(kernel), tuple(stride), groups, pointwise),
            channels_last=input.movedim(1, -1).is_contiguous(),
            gpu=gpu_name(weight.device),
            tf32=input.dtype is torch.float32 and tf32_allowed(convolution=True),
            needs_grad_input=input.requires_grad and torch.is_grad_enabled(),
            packed_available=packed_available,
        )


def masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    options: MaskOptions,
    source: WeightSource = FRESH,
) -> tuple[Tensor, Tensor]:
    """Convolve; return what `masked_product` does. Geometry and shapes are as in `F.conv2d`."""
    input, geometry, batched = _resolve(input, weight, stride, padding, dilation, groups)
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_conv(input, weight, threshold, bias, geometry)
    operands = input, weight, threshold, bias
    output, effective = masked_product(_Conv, *operands, (geometry,), options, source)
    return output if batched else output.squeeze(0), effective


def attached_conv(
    input: Tensor,
    masked: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    options: MaskOptions,
    known: MaskedWeightInMemory | None,
) -> Tensor:
    """Return `multiply` of a W * M that has its gradients, for the geometry as in `F.conv2d`."""
    if never_kept(masked, options):
        if known is not None:
            masked = known.dense(masked)
        return TORCH_CONVS[masked.dim()](input, masked, bias, stride, padding, dilation, groups)
    input, geometry, batched = _resolve(input, masked, stride, padding, dilation, groups)
    output = multiply(_Conv, input, masked, bias, (geometry,), options, known)
    return output if batched else output.squeeze(0)


def _resolve(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry, bool]:
    """Return the input as a batch, the geometry in numbers, and whether the input was a batch."""
    spatial = weight.dim() - 2
    stride = per_dimension("stride", stride, spatial)
    dilation = per_dimension("dilation", dilation, spatial)
    batched = input.dim() != spatial + 1
    if not batched:
        input = input.unsqueeze(0)
    input, padding = resolve_padding(input, padding, weight.shape[2:], stride, dilation)
    return input, Geometry(stride, padding, dilation, groups), batched
