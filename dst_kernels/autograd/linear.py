"""The masked linear layer: a plan's products, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._backends import serving
from .._checks import check_linear, check_surrogate
from .._device import gpu_name, tf32_allowed
from .._plan import FUSED, PLANS, Plan, check_path, plan_linear
from ..reference.linear import dense_weight_gradient, flatten_batch, linear
from ._function import (
    DENSE,
    MaskedFunction,
    cast_for_autocast,
    once_differentiable,
    path_when_compiled,
    path_without_fused_kernels,
    save_operands,
    wanted,
)
from .weight import Packed, pack

__all__ = ["masked_linear"]


class _MaskedLinear(MaskedFunction):
    """Returns (output,) where it is given `packed` and `effective`, else (output, effective)."""

    @staticmethod
    def compute(
        input, weight, threshold, bias, packed, effective, reset_ratio, keep_packed,
        grad_input_path, grad_weight_path, surrogate, structure_gradient, backend,
    ):  # fmt: skip
        if packed is not None:
            return (linear(input, packed, bias),)
        return _ops.call(_ops.masked_linear, input, weight, threshold, bias, reset_ratio, backend)

    @staticmethod
    def save(ctx, inputs, outputs):
        input, weight, _, bias, packed, effective, _, keep_packed, *options = inputs
        if packed is None:
            effective = outputs[1]
            ctx.mark_non_differentiable(effective)
        ctx.grad_input_path, ctx.grad_weight_path, *ctx.options = options
        save_operands(ctx, input, weight, effective, packed if keep_packed else None)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        input, weight, effective, packed = ctx.saved_tensors
        backend = ctx.options[-1]
        grad_input = grad_bias = None
        grads = (None, None)
        if ctx.needs_input_grad[0]:
            if ctx.grad_input_path == FUSED:
                grad_input = _ops.call(
                    _ops.masked_linear_grad_input, grad, weight, effective, backend
                )
            else:
                if packed is None:
                    packed = pack(weight, effective, None, grad.dtype, backend).masked
                grad_input = grad @ packed
        if any(ctx.needs_input_grad[1:3]):
            if ctx.grad_weight_path == FUSED:
                grads = _ops.call(
                    _ops.masked_linear_grad_weight, grad, input, weight, effective, *ctx.options
                )
            else:
                dense = dense_weight_gradient(grad, input)
                grads = dense, None
                if ctx.grad_weight_path != DENSE:
                    grads = _ops.call(
                        _ops.masked_weight_backward, dense, weight, effective, *ctx.options
                    )
        if ctx.needs_input_grad[3]:
            grad_bias = flatten_batch(grad).sum(0, dtype=ctx.bias_dtype)
        return grad_input, *wanted(ctx, 1, grads), grad_bias, *[None] * 9


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    *,
    reset_ratio: float | None,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
    path: str,
    packed: Packed | None = None,
    keep_packed: bool = True,
    dense_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, effective threshold); gradients go to input, `weight`, `threshold` and bias.

    `packed` spares the packing where weight and threshold are as they were when it was made. With
    `keep_packed` the backward pass finds the masked copy again; without, it makes a new one. With
    `dense_gradient` the gradient of the weight is G itself, and the threshold has none.
    """
    check_surrogate(surrogate)
    check_path(path)
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_linear(input, weight, threshold, bias)
    input = cast_for_autocast(input, weight)
    plan = _plan(path, backend, input, weight, packed is not None)
    if plan.forward == FUSED:
        packed = None
    elif packed is None:
        packed = pack(weight, threshold, reset_ratio, input.dtype, backend)
    masked, effective = (None, None) if packed is None else packed
    outputs = _MaskedLinear.apply(
        input, weight, threshold, bias, masked, effective, reset_ratio, keep_packed,
        plan.grad_input, DENSE if dense_gradient else plan.grad_weight,
        surrogate, structure_gradient, backend,
    )  # fmt: skip
    return (outputs[0], effective) if len(outputs) == 1 else outputs


def _plan(path: str, backend: str, input: Tensor, weight: Tensor, packed_available: bool) -> Plan:
    if path == "auto" and torch.compiler.is_compiling():
        # A choice by M would compile the graph anew at each crossover, and a plain matmul is one
        # that the compiler can tune and give an epilogue.
        path = path_when_compiled(backend, weight)
    if path != "auto":
        return PLANS[path]
    names = serving(backend, weight.device)
    if "triton" not in names:
        return PLANS[path_without_fused_kernels(names)]
    return plan_linear(
        input.shape[:-1].numel(),
        *weight.shape,
        input.dtype,
        weight.dtype,
        gpu=gpu_name(weight.device),
        tf32=tf32_allowed(),
        needs_grad_input=input.requires_grad and torch.is_grad_enabled(),
        packed_available=packed_available,
    )
