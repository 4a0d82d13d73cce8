"""The masked transposed convolution: packed, on its weight seen by group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.conv_checks import check_conv_transpose
from ..ops.geometry import per_dimension
from ..plan import CONV_TRANSPOSE_PATHS, check_path
from ..reference.conv_transpose import (
    by_group,
    conv_transpose,
    conv_transpose_dense_weight_gradient,
    conv_transpose_grad_input,
    not_by_group,
)
from .conv import conv_grad_bias
from .product import Product, masked_product

__all__ = ["masked_conv_transpose"]


class _ConvTranspose(Product):
    """Of weights by group; `geometry` as in torch's functions."""

    grad_bias = staticmethod(conv_grad_bias)

    @staticmethod
    def forward(input: Tensor, masked: Tensor, bias: Tensor | None, *geometry) -> Tensor:
        return conv_transpose(input, masked.flatten(0, 1), bias, *geometry)

    @staticmethod
    def grad_input(grad: Tensor, like: Tensor, masked: Tensor, *geometry) -> Tensor:
        return conv_transpose_grad_input(grad, like, masked.flatten(0, 1), *geometry)

    @staticmethod
    def dense_gradient(grad: Tensor, input: Tensor, weight: Tensor, *geometry) -> Tensor:
        dense = conv_transpose_dense_weight_gradient(grad, input, weight.flatten(0, 1), *geometry)
        return dense.unflatten(0, weight.shape[:2])


def masked_conv_transpose(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    *,
    path: str,
    **options,
) -> tuple[Tensor, Tensor]:
    """Geometry and an absent batch dimension as in torch's transposed convolutions.

    `options` and result of `masked_product`; the threshold of an output channel gets the sum of
    what its weights' copies of it get, from autograd's way back through the view.
    """
    check_path(path, CONV_TRANSPOSE_PATHS)
    spatial = weight.dim() - 2
    stride = per_dimension("stride", stride, spatial)
    padding = per_dimension("padding", padding, spatial)
    output_padding = per_dimension("output_padding", output_padding, spatial)
    dilation = per_dimension("dilation", dilation, spatial)
    geometry = stride, padding, output_padding, groups, dilation
    batched = input.dim() != spatial + 1
    if not batched:
        input = input.unsqueeze(0)
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_conv_transpose(input, weight, threshold, bias, *geometry)
    output, effective = masked_product(
        _ConvTranspose,
        input,
        *by_group(weight, threshold, groups),
        bias,
        *geometry,
        path="packed",
        **options,
    )
    return output if batched else output.squeeze(0), not_by_group(effective, threshold)
