"""Compute Y = X (W * M)^T + b and its gradients. The product runs in the input's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .weight import masked_weight, weight_gradients_


def flatten_batch(tensor: Tensor) -> Tensor:
    """Reshape [..., features] to [batch, features], also where there are no features."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return input [..., in] times weight^T [in, out] plus bias [out], shaped [..., out].

    Input and weight share a dtype; the bias may have another.
    """
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    output = F.linear(flatten_batch(input), weight, bias)
    if input.dim() == 2:
        return output
    # Autograd must not see a view here, so that callers may overwrite the result (`relu_`).
    return torch.ops.aten._unsafe_view(output, [*input.shape[:-1], weight.shape[0]])


def dense_weight_gradient(grad: Tensor, input: Tensor) -> Tensor:
    """Return G = dY^T X [out, in] from grad [..., out] and input [..., in]."""
    return flatten_batch(grad).t() @ flatten_batch(input)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (`linear` with the masked weight, effective threshold)."""
    masked, effective = masked_weight(weight, threshold, reset_ratio, input.dtype)
    return linear(input, masked, bias), effective


def masked_linear_grad_input(grad: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """Return dX = dY (W * M) [..., in] from grad [..., out]."""
    return grad @ masked_weight(weight, threshold, None, grad.dtype)[0]


def masked_linear_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    surrogate: str,
    structure_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dW, dt), with G = dY^T X."""
    dense = dense_weight_gradient(grad, input)
    return weight_gradients_(dense, weight, threshold, surrogate, structure_gradient)
