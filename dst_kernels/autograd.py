"""Autograd functions around the ops: what is saved, which gradients are computed, autocast.

They save the input, the weight and the effective threshold, never a mask, and can be
differentiated once: the surrogate is not a derivative, so there is no second one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops
from ._autocast import autocast_enabled
from ._checks import check_same_dtype, check_surrogate
from ._conv_arguments import per_dimension, resolve_padding
from .reference.linear import flatten_batch
from .reference.regularization import sparse_regularization_and_slope

__all__ = ["masked_conv", "masked_linear", "masked_weight", "sparse_regularization"]


class _Function(Function):
    """Subclasses have `compute(*inputs)`, `save(ctx, inputs, output)` and `backward(ctx, *grads)`.

    torch offers that split too, but then binds the arguments to forward's signature at every call,
    which costs as much as a small layer. Only torch.func needs it, and gets it from a twin class.
    """

    def __init_subclass__(cls) -> None:
        def forward(ctx, *inputs):
            output = cls.compute(*inputs)
            cls.save(ctx, inputs, output)
            return output

        cls.forward = staticmethod(forward)
        members = {"forward": cls.compute, "setup_context": cls.save, "backward": cls.backward}
        members = {name: staticmethod(function) for name, function in members.items()}
        cls.twin = type(f"{cls.__name__}ForFunc", (Function,), members)

    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active():
            return cls.twin.apply(*args)
        return super().apply(*args)


class _RefuseSecondDerivative(Function):
    """Hands gradients through; its own backward is the second derivative, which does not exist."""

    @staticmethod
    def forward(grad_output, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "dst_kernels operations can be differentiated once only: the gradient of a threshold "
            "mask is a surrogate, not a derivative, so a second derivative (create_graph=True, "
            "gradient penalties, Hessians) has no meaning"
        )


def _once_differentiable(backward):
    """As torch's decorator of that name, with an error that says why."""

    @functools.wraps(backward)
    def wrapper(ctx, grad, *others):
        if not torch.is_grad_enabled():  # unless create_graph was given
            return backward(ctx, grad, *others)
        with torch.no_grad():
            grads = backward(ctx, grad, *others)
        return _RefuseSecondDerivative.apply(grad, *grads) if grad.requires_grad else grads

    return wrapper


class _MaskedWeight(_Function):
    @staticmethod
    def compute(weight, threshold, effective, dtype, surrogate, structure_gradient, backend):
        return _ops.call(_ops.masked_weight, weight, effective, dtype, backend)

    @staticmethod
    def save(ctx, inputs, output):
        weight, _, effective, _, *options = inputs
        ctx.options = options
        ctx.save_for_backward(weight, effective)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        weight, effective = ctx.saved_tensors
        grads = _ops.call(_ops.masked_weight_backward, grad, weight, effective, *ctx.options)
        return *_wanted(ctx, 0, grads), None, None, None, None, None


class _MaskedLinear(_Function):
    @staticmethod
    def compute(input, weight, threshold, bias, effective, surrogate, structure_gradient, backend):
        return _ops.call(_ops.masked_linear, input, weight, effective, bias, backend)

    @staticmethod
    def save(ctx, inputs, output):
        input, weight, _, bias, effective, *options = inputs
        ctx.options = options
        _save(ctx, input, weight, effective, bias)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        input, weight, effective = ctx.saved_tensors
        grad_input = grad_bias = None
        grads = (None, None)
        if ctx.needs_input_grad[0]:
            grad_input = _ops.call(
                _ops.masked_linear_grad_input, grad, weight, effective, ctx.options[-1]
            )
        if any(ctx.needs_input_grad[1:3]):
            grads = _ops.call(
                _ops.masked_linear_grad_weight, grad, input, weight, effective, *ctx.options
            )
        if ctx.needs_input_grad[3]:
            grad_bias = flatten_batch(grad).sum(0, dtype=ctx.bias_dtype)
        return grad_input, *_wanted(ctx, 1, grads), grad_bias, None, None, None, None


class _SparseRegularization(_Function):
    """One node for all layers, where plain autograd makes a dozen and one more for each."""

    @staticmethod
    def compute(*thresholds):
        flat = torch.cat([threshold.reshape(-1) for threshold in thresholds])
        return sparse_regularization_and_slope(flat)

    @staticmethod
    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.like = [(threshold.shape, threshold.dtype) for threshold in inputs]

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        parts = (grad * slope).split([shape.numel() for shape, _ in ctx.like])
        return tuple(
            part.reshape(shape).to(dtype)
            for part, (shape, dtype) in zip(parts, ctx.like, strict=True)
        )


class _MaskedConv(_Function):
    @staticmethod
    def compute(
        input,
        weight,
        threshold,
        bias,
        effective,
        stride,
        padding,
        dilation,
        groups,
        surrogate,
        structure_gradient,
        backend,
    ):
        return _ops.call(
            _ops.masked_conv,
            input,
            weight,
            effective,
            bias,
            stride,
            padding,
            dilation,
            groups,
            backend,
        )

    @staticmethod
    def save(ctx, inputs, output):
        input, weight, _, bias, effective, *options = inputs
        ctx.geometry, ctx.options = options[:4], options[4:]
        ctx.input_shape = input.shape
        _save(ctx, input, weight, effective, bias)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        input, weight, effective = ctx.saved_tensors
        grad_input = grad_bias = None
        grads = (None, None)
        if ctx.needs_input_grad[0]:
            grad_input = _ops.call(
                _ops.masked_conv_grad_input,
                grad,
                ctx.input_shape,
                weight,
                effective,
                *ctx.geometry,
                ctx.options[-1],
            )
        if any(ctx.needs_input_grad[1:3]):
            grads = _ops.call(
                _ops.masked_conv_grad_weight,
                grad,
                input,
                weight,
                effective,
                *ctx.geometry,
                *ctx.options,
            )
        if ctx.needs_input_grad[3]:
            summed = (0, *range(2, grad.dim()))
            grad_bias = grad.sum(summed, dtype=ctx.bias_dtype)
        return grad_input, *_wanted(ctx, 1, grads), grad_bias, *[None] * 8


def _save(ctx, input, weight, effective, bias) -> None:
    """Save what the wanted gradients need and no more."""
    of_input, of_weight, of_threshold = ctx.needs_input_grad[:3]
    of_mask = of_weight or of_threshold
    ctx.save_for_backward(
        input if of_mask else None,
        weight if of_input or of_mask else None,
        effective if of_input or of_mask else None,
    )
    ctx.bias_dtype = None if bias is None else bias.dtype


def _wanted(ctx, first: int, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`grads` of the inputs from position `first` on, None where none is needed."""
    needed = ctx.needs_input_grad[first : first + len(grads)]
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


_CAST_BY_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)  # float64 it leaves alone


def _cast_for_autocast(input: Tensor, weight: Tensor) -> Tensor:
    """The input in the dtype of the product; the weight keeps its own for the comparison."""
    device_type = weight.device.type
    if autocast_enabled(device_type) and input.dtype in _CAST_BY_AUTOCAST:
        return input.to(torch.get_autocast_dtype(device_type))
    check_same_dtype(input, weight)
    return input


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    effective: Tensor,
    *,
    dtype: torch.dtype | None,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
) -> Tensor:
    """`effective` decides the mask; gradients go to `weight` and `threshold`."""
    check_surrogate(surrogate)
    return _MaskedWeight.apply(
        weight,
        threshold,
        effective,
        weight.dtype if dtype is None else dtype,
        surrogate,
        structure_gradient,
        backend,
    )


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    *,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
) -> Tensor:
    """`effective` decides the mask; gradients go to input, `weight`, `threshold` and bias."""
    check_surrogate(surrogate)
    input = _cast_for_autocast(input, weight)
    return _MaskedLinear.apply(
        input, weight, threshold, bias, effective, surrogate, structure_gradient, backend
    )


def masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    *,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
) -> Tensor:
    """As `masked_linear`; the geometry and an absent batch dimension as in torch's convolutions."""
    check_surrogate(surrogate)
    spatial = weight.dim() - 2
    stride = per_dimension("stride", stride, spatial)
    dilation = per_dimension("dilation", dilation, spatial)
    batched = input.dim() != spatial + 1
    if not batched:
        input = input.unsqueeze(0)
    input, padding = resolve_padding(input, padding, weight.shape[2:], stride, dilation)
    output = _MaskedConv.apply(
        _cast_for_autocast(input, weight),
        weight,
        threshold,
        bias,
        effective,
        stride,
        padding,
        dilation,
        groups,
        surrogate,
        structure_gradient,
        backend,
    )
    return output if batched else output.squeeze(0)


def sparse_regularization(thresholds: Sequence[Tensor]) -> Tensor:
    """Sum of exp(-t) over all elements of tensors on one device."""
    return _SparseRegularization.apply(*thresholds)[0]
