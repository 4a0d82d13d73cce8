"""Multiply by the masked weight of a linear layer, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..backends.device import gpu_name, tf32_allowed
from ..ops.checks import check_linear
from ..plan import Plan, plan_linear
from ..reference.linear import dense_weight_gradient, flatten_batch, linear
from .kept import MaskedWeightInMemory, multiply
from .options import MaskOptions
from .product import Product, masked_product
from .weight import FRESH, WeightSource


class _Linear(Product):
    multiply = staticmethod(F.linear)
    forward = staticmethod(linear)
    kept_forward, kept_grad_input = "kept_linear", "kept_linear_grad_input"
    kept_grad_weight = "kept_linear_grad_weight"
    fused_forward = ops.masked_linear
    fused_grad_input = ops.masked_linear_grad_input
    fused_grad_weight = ops.masked_linear_grad_weight

    @staticmethod
    def grad_input(grad: Tensor, like: Tensor | None, masked: Tensor) -> Tensor:
        return grad @ masked

    @staticmethod
    def dense_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return dense_weight_gradient(grad, input)

    @staticmethod
    def grad_bias(grad: Tensor, dtype: torch.dtype) -> Tensor:
        grad = flatten_batch(grad)
        if grad.dtype is dtype is torch.float32:
            return grad.sum(0)
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad.sum(0, dtype=wide).to(dtype)

    @staticmethod
    def sizes(input: Tensor, weight: Tensor) -> tuple[int, int, int, str]:
        rows, columns = weight.shape
        return input.numel() // columns, rows, columns, "linear"

    @staticmethod
    def fastest(input: Tensor, weight: Tensor, packed_available: bool) -> Plan:
        rows, columns = weight.shape
        return plan_linear(
            input.shape[:-1].numel(),
            rows,
            columns,
            input.dtype,
            weight.dtype,
            gpu=gpu_name(weight.device),
            tf32=input.dtype is torch.float32 and tf32_allowed(),
            needs_grad_input=input.requires_grad and torch.is_grad_enabled(),
            packed_available=packed_available,
        )


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    options: MaskOptions,
    source: WeightSource = FRESH,
) -> tuple[Tensor, Tensor]:
    """Return `masked_product` of input [..., in] and weight [out, in]."""
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_linear(input, weight, threshold, bias)
    return masked_product(_Linear, input, weight, threshold, bias, (), options, source)


def attached_linear(
    input: Tensor,
    masked: Tensor,
    bias: Tensor | None,
    options: MaskOptions,
    known: MaskedWeightInMemory | None,
) -> Tensor:
    """Return `multiply` of a W * M that has its gradients: `masked`, in the input's dtype."""
    return multiply(_Linear, input, masked, bias, (), options, known)
