"""The product of an input and a masked weight, whichever layer's: a plan's ops, both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import ops
from ..backends import serving
from ..backends.compiled import library
from ..ops.checks import check_surrogate
from ..plan import FUSED, PACKED, PLANS, Plan, check_path
from ._function import MaskedFunction, cast_for_autocast, wanted
from .weight import Packed, pack

__all__ = ["Product", "masked_product"]

# A path of the weight's gradient: return G unchanged; the optimizer derives dW and dt.
_RAW = "raw"


class Product:
    """What the product of a kind of layer is made of: a class of functions, without instances.

    `geometry` is all that it depends on besides the tensors, nothing for a linear layer. Where
    there is one, gradients of the input are also told the shape it has, by a tensor `like` it: the
    input itself where it was saved. Several sizes of a convolution's input lead to one of its
    output.
    """

    # Packed, in ATen.
    forward: ClassVar[Callable]  # (input, masked, bias, *geometry) -> output
    grad_input: ClassVar[Callable]  # (grad, like, masked, *geometry) -> dX
    dense_gradient: ClassVar[Callable]  # (grad, input, weight, *geometry) -> G
    grad_bias: ClassVar[Callable]  # (grad, dtype) -> db
    # Fused: ops, which take `geometry` after their tensors. Absent where there is but one path.
    fused_forward: ClassVar[OpOverload]
    fused_grad_input: ClassVar[OpOverload]
    fused_grad_weight: ClassVar[OpOverload]

    @staticmethod
    def fastest(input: Tensor, weight: Tensor, packed_available: bool, *geometry) -> Plan:
        """The plan where there are fused kernels to choose."""
        raise NotImplementedError


class _MaskedProduct(MaskedFunction):
    """Returns (output,) where it is given `packed` and `effective`, else (output, effective)."""

    @staticmethod
    def compute(
        input, weight, threshold, bias, packed, effective, product, reset_ratio, keep_packed,
        grad_input_path, grad_weight_path, surrogate, structure_gradient, backend, *geometry,
    ):  # fmt: skip
        if packed is not None:
            return (product.forward(input, packed, bias, *geometry),)
        operands = input, weight, threshold, bias, reset_ratio
        return ops.call(product.fused_forward, *operands, *geometry, backend)

    @staticmethod
    def save(ctx, inputs, outputs):
        input, weight, _, bias, packed, effective, ctx.product, _, keep_packed, *options = inputs
        if packed is None:
            effective = outputs[1]
            ctx.mark_non_differentiable(effective)
        ctx.grad_input_path, ctx.grad_weight_path = options[:2]
        ctx.options, ctx.geometry = options[2:5], options[5:]
        ctx.shape = (input.shape,) if ctx.geometry else ()
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save_operands(ctx, input, weight, effective, packed if keep_packed else None)

    @staticmethod
    def gradients(ctx, grad, *_):
        input, weight, effective, packed = ctx.saved_tensors
        product, backend = ctx.product, ctx.options[-1]
        grad_input = grad_bias = None
        grads = (None, None)
        # The weight's first: its G is gone again when the input's gradient is made.
        if any(ctx.needs_input_grad[1:3]):
            if ctx.grad_weight_path == FUSED:
                operands = grad, input, weight, effective
                arguments = *operands, *ctx.geometry, *ctx.options
                grads = ops.call(product.fused_grad_weight, *arguments)
            else:
                grads = product.dense_gradient(grad, input, weight, *ctx.geometry), None
                if ctx.grad_weight_path != _RAW:
                    operands = grads[0], weight, effective
                    grads = ops.call(ops.masked_weight_backward, *operands, *ctx.options)
                    del operands
        if ctx.needs_input_grad[0]:
            if ctx.grad_input_path == FUSED:
                operands = grad, *ctx.shape, weight, effective
                grad_input = ops.call(product.fused_grad_input, *operands, *ctx.geometry, backend)
            else:
                if packed is None:
                    packed = pack(weight, effective, None, grad.dtype, backend).masked
                like = input
                if input is None and ctx.geometry:
                    like = grad.new_empty(*ctx.shape)
                grad_input = product.grad_input(grad, like, packed, *ctx.geometry)
        if ctx.needs_input_grad[3]:
            grad_bias = product.grad_bias(grad, ctx.bias_dtype)
        none = [None] * (10 + len(ctx.geometry))
        return grad_input, *wanted(ctx, 1, grads), grad_bias, *none


def _save_operands(
    ctx, input: Tensor, weight: Tensor, effective: Tensor, packed: Tensor | None
) -> None:
    """Save what the wanted gradients need and no more; `packed` serves the input's alone."""
    of_input, of_weight, of_threshold = ctx.needs_input_grad[:3]
    of_mask = of_weight or of_threshold
    if not of_input or ctx.grad_input_path == FUSED:
        packed = None
    from_weight = of_mask or (of_input and packed is None)
    ctx.save_for_backward(
        input if of_mask else None,
        weight if from_weight else None,
        effective if from_weight else None,
        packed,
    )


def masked_product(
    product: type[Product],
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    *geometry,
    reset_ratio: float | None,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
    path: str,
    recall: Callable[..., Packed] | None = None,
    keep_packed: bool = True,
    dense_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, effective threshold); gradients go to input, `weight`, `threshold` and bias.

    The caller has checked the tensors. `recall` stands in for `pack` where it remembers what it has
    packed. With `keep_packed` the backward pass finds the masked copy again; without, it makes a
    new one. With `dense_gradient` the gradient of the weight is G itself, and the threshold has
    none.
    """
    check_surrogate(surrogate)
    check_path(path)
    input = cast_for_autocast(input, weight)
    plan = _plan(product, path, backend, input, weight, recall is not None, *geometry)
    masked = effective = None
    if plan.forward == PACKED:
        packed = (recall or pack)(weight, threshold, reset_ratio, input.dtype, backend)
        masked, effective = packed
    outputs = _MaskedProduct.apply(
        input, weight, threshold, bias, masked, effective, product, reset_ratio, keep_packed,
        plan.grad_input, _RAW if dense_gradient else plan.grad_weight,
        surrogate, structure_gradient, backend, *geometry,
    )  # fmt: skip
    return (outputs[0], effective) if len(outputs) == 1 else outputs


def _plan(
    product: type[Product],
    path: str,
    backend: str,
    input: Tensor,
    weight: Tensor,
    packed_available: bool,
    *geometry,
) -> Plan:
    if path != "auto":
        return PLANS[path]
    if torch.compiler.is_compiling():
        # A choice by sizes would compile the graph anew at each crossover, and a plain product is
        # one that the compiler can tune and give an epilogue. Who will serve is a guess from what
        # the compiler takes for constant; every backend can do the packed path.
        by_reference = backend == "reference" or (backend == "auto" and not library.BUILT["cpu"])
        return _without_fused_kernels(by_reference and not weight.is_cuda)
    names = serving(backend, weight.device)
    if "triton" in names:
        return product.fastest(input, weight, packed_available, *geometry)
    return _without_fused_kernels("reference" in names)


def _without_fused_kernels(by_reference: bool) -> Plan:
    """The reference's fused functions have no kernels, but spare the packed path a copy of G."""
    return PLANS["mixed" if by_reference else "packed"]
