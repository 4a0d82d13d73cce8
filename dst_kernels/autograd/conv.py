"""The masked convolution: packed or one op, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from .._backends import serving
from .._checks import check_conv, check_surrogate
from .._conv_arguments import per_dimension, resolve_padding
from .._plan import FUSED, PLANS, Plan, check_path
from ..reference.conv import conv, conv_dense_weight_gradient, conv_grad_input
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

__all__ = ["masked_conv"]


class _MaskedConv(MaskedFunction):
    """Returns (output,) where it is given `packed` and `effective`, else (output, effective)."""

    @staticmethod
    def compute(
        input, weight, threshold, bias, packed, effective, reset_ratio, keep_packed,
        stride, padding, dilation, groups,
        grad_input_path, grad_weight_path, surrogate, structure_gradient, backend,
    ):  # fmt: skip
        geometry = stride, padding, dilation, groups
        if packed is not None:
            return (conv(input, packed, bias, *geometry),)
        return _ops.call(
            _ops.masked_conv, input, weight, threshold, bias, reset_ratio, *geometry, backend
        )

    @staticmethod
    def save(ctx, inputs, outputs):
        input, weight, _, bias, packed, effective, _, keep_packed, *options = inputs
        if packed is None:
            effective = outputs[1]
            ctx.mark_non_differentiable(effective)
        ctx.geometry = options[:4]
        ctx.grad_input_path, ctx.grad_weight_path, *ctx.options = options[4:]
        ctx.input_shape = input.shape
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
                    _ops.masked_conv_grad_input,
                    grad, ctx.input_shape, weight, effective, *ctx.geometry, backend,
                )  # fmt: skip
            else:
                if packed is None:
                    packed = pack(weight, effective, None, grad.dtype, backend).masked
                grad_input = conv_grad_input(grad, ctx.input_shape, packed, *ctx.geometry)
        if any(ctx.needs_input_grad[1:3]):
            if ctx.grad_weight_path == FUSED:
                grads = _ops.call(
                    _ops.masked_conv_grad_weight,
                    grad, input, weight, effective, *ctx.geometry, *ctx.options,
                )  # fmt: skip
            else:
                dense = conv_dense_weight_gradient(grad, input, weight, *ctx.geometry)
                grads = dense, None
                if ctx.grad_weight_path != DENSE:
                    grads = _ops.call(
                        _ops.masked_weight_backward, dense, weight, effective, *ctx.options
                    )
        if ctx.needs_input_grad[3]:
            summed = (0, *range(2, grad.dim()))
            grad_bias = grad.sum(summed, dtype=ctx.bias_dtype)
        return grad_input, *wanted(ctx, 1, grads), grad_bias, *[None] * 13


def masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
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
    """As `masked_linear`; the geometry and an absent batch dimension as in torch's convolutions."""
    check_surrogate(surrogate)
    check_path(path)
    spatial = weight.dim() - 2
    stride = per_dimension("stride", stride, spatial)
    dilation = per_dimension("dilation", dilation, spatial)
    batched = input.dim() != spatial + 1
    if not batched:
        input = input.unsqueeze(0)
    input, padding = resolve_padding(input, padding, weight.shape[2:], stride, dilation)
    if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
        check_conv(input, weight, threshold, bias, stride, padding, dilation, groups)
    input = cast_for_autocast(input, weight)
    plan = _plan(path, backend, weight)
    if plan.forward == FUSED:
        packed = None
    elif packed is None:
        packed = pack(weight, threshold, reset_ratio, input.dtype, backend)
    masked, effective = (None, None) if packed is None else packed
    outputs = _MaskedConv.apply(
        input, weight, threshold, bias, masked, effective, reset_ratio, keep_packed,
        stride, padding, dilation, groups,
        plan.grad_input, DENSE if dense_gradient else plan.grad_weight,
        surrogate, structure_gradient, backend,
    )  # fmt: skip
    output = outputs[0] if batched else outputs[0].squeeze(0)
    return output, effective if len(outputs) == 1 else outputs[1]


def _plan(path: str, backend: str, weight: Tensor) -> Plan:
    if path == "auto":
        if torch.compiler.is_compiling():
            path = path_when_compiled(backend, weight)
        else:
            path = path_without_fused_kernels(serving(backend, weight.device))
    return PLANS[path]
