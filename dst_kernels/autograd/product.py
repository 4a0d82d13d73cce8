"""Multiply an input by a masked weight as a plan says, forward and backward, for any layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import ops
from ..backends import serving
from ..plan import FUSED, PACKED, PLANS, Plan
from ._function import MaskedFunction, cast_for_autocast, is_transformed, wanted
from .fixed import fixed_product
from .kept import multiply
from .options import MaskOptions
from .weight import FRESH, MADE, WeightSource, masked_weight, pack

# A path of the weight's gradient: return G unchanged; the optimizer derives dW and dt.
_RAW = "raw"


class Product:
    """Hold the functions that multiply for one kind of layer; the class has no instances.

    `*geometry` is one `Geometry`, or nothing for a linear layer. With one, `grad_input` also needs
    the input's shape, because inputs of several sizes give outputs of the same size: it gets the
    saved input, or an empty tensor `like` it. Ops take the geometry's members one by one, after
    their tensors.
    """

    multiply: ClassVar[Callable]  # (input, masked, bias, *geometry) -> output; torch's gradients
    # The same without autograd, and its gradients.
    forward: ClassVar[Callable]
    grad_input: ClassVar[Callable]  # (grad, like, masked, *geometry) -> dX
    dense_gradient: ClassVar[Callable]  # (grad, input, weight, *geometry) -> G
    grad_bias: ClassVar[Callable]  # (grad, dtype) -> db
    # By kept elements: names of the reference's functions; none where there are none. What a
    # geometry is to others is to these the kernel's size, and the geometry.
    kept_forward: ClassVar[str] = ""
    kept_grad_input: ClassVar[str] = ""
    kept_grad_weight: ClassVar[str] = ""  # (grad, input, places, *geometry) -> dW of kept elements
    # Fused: ops.
    fused_forward: ClassVar[OpOverload]
    fused_grad_input: ClassVar[OpOverload]
    fused_grad_weight: ClassVar[OpOverload]

    @staticmethod
    def sizes(input: Tensor, weight: Tensor, *geometry) -> tuple[int, int, int, str]:
        """Return what the planner judges a product with kept elements by: M, N, K and the kind."""
        raise NotImplementedError

    @staticmethod
    def fastest(input: Tensor, weight: Tensor, packed_available: bool, *geometry) -> Plan:
        """Return the fastest plan where fused kernels are available."""
        raise NotImplementedError


class _MaskedProduct(MaskedFunction):
    """Return (output,) if `packed` and `effective` are given, else (output, effective)."""

    @staticmethod
    def compute(input, weight, threshold, bias, packed, effective, how):
        product, geometry, _, _, reset_ratio, *_, backend = how
        if packed is not None:
            return (product.forward(input, packed, bias, *geometry),)
        operands = input, weight, threshold, bias, reset_ratio
        return ops.call(product.fused_forward, *operands, *chain(*geometry), backend)

    @staticmethod
    def save(ctx, inputs, outputs):
        input, weight, _, bias, packed, effective, how = inputs
        ctx.product, geometry, grad_paths, keep_packed, _, *options = how
        ctx.grad_input_path, ctx.grad_weight_path = grad_paths
        if packed is None:
            effective = outputs[1]
            ctx.mark_non_differentiable(effective)
        ctx.options, ctx.geometry = options, geometry
        ctx.shape = (input.shape,) if geometry else ()
        ctx.bias_dtype = None if bias is None else bias.dtype
        # What the wanted gradients need and no more; `packed` serves the input's alone.
        of_input, *of_mask = ctx.needs_input_grad[:3]
        if not (keep_packed and of_input) or ctx.grad_input_path == FUSED:
            packed = None
        from_weight = any(of_mask) or (of_input and packed is None)
        kept = weight, effective
        ctx.save_for_backward(
            input if any(of_mask) else None, *(kept if from_weight else (None, None)), packed
        )

    @staticmethod
    def gradients(ctx, grad, *_):
        input, weight, effective, packed = ctx.saved_tensors
        product, backend = ctx.product, ctx.options[-1]
        grad_input = grad_bias = None
        grads = (None, None)
        # The weight's gradient comes first: G is freed before the input's gradient is made.
        if any(ctx.needs_input_grad[1:3]):
            if ctx.grad_weight_path == FUSED:
                operands: tuple[Any, ...] = grad, input, weight, effective
                arguments = *operands, *chain(*ctx.geometry), *ctx.options
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
                arguments = *operands, *chain(*ctx.geometry), backend
                grad_input = ops.call(product.fused_grad_input, *arguments)
            else:
                if packed is None:
                    as_it_is = MaskOptions(reset_ratio=None, backend=backend)
                    packed = pack(weight, effective, as_it_is, grad.dtype).masked
                like = input
                if input is None and ctx.geometry:
                    like = grad.new_empty(*ctx.shape)
                grad_input = product.grad_input(grad, like, packed, *ctx.geometry)
        if ctx.needs_input_grad[3]:
            grad_bias = product.grad_bias(grad, ctx.bias_dtype)
        return grad_input, *wanted(ctx, 1, grads), grad_bias, None, None, None


def masked_product(
    product: type[Product],
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    options: MaskOptions,
    source: WeightSource = FRESH,
) -> tuple[Tensor, Tensor]:
    """Return (output, effective threshold), as `Packed` has it, with gradients to all four tensors.

    The caller has checked tensors and options; `geometry` has a `Geometry`, or nothing for a linear
    layer. The packed plan is two nodes, a masked weight and torch's own operation; every other
    plan, and a weight that may not be kept, is one node.
    """
    input = cast_for_autocast(input, weight)
    plan = _plan(product, input, weight, geometry, options, source)
    fixed = source.fixed
    if fixed is not None and fixed.serves(product, input, weight, geometry, options):
        output = fixed_product(product, input, weight, bias, geometry, fixed, options.backend)
        return output, threshold
    if plan == PLANS["sparse"] and not source.keep:
        plan = PLANS["packed"]
    if plan in (PLANS["packed"], PLANS["sparse"]) and source.keep:
        operands = weight, threshold, options, input.dtype, source
        made = masked_weight(*operands, checked=True)
        if bias is not None and bias.dtype != input.dtype:
            bias = bias.to(input.dtype)
        return multiply(product, input, made.masked, bias, geometry, options), made.effective
    masked = effective = None
    commit = False
    if plan.forward == PACKED:
        how_to_pack = weight, threshold, options, input.dtype
        recalled = None if source.recall is None else source.recall(*how_to_pack)
        if recalled is None:
            commit = source.commit and ops.can_commit(weight, threshold)
            recalled = pack(*how_to_pack, commit)
        masked, effective = recalled
    grad_paths = plan.grad_input, _RAW if source.dense_gradient else plan.grad_weight
    how = (
        product, geometry, grad_paths, source.keep,
        options.reset_ratio, options.surrogate, options.structure_gradient, options.backend,
    )  # fmt: skip
    outputs = _MaskedProduct.apply(input, weight, threshold, bias, masked, effective, how)
    if commit:
        return outputs[0], threshold
    return outputs[0], outputs[1] if effective is None else effective


def _plan(
    product: type[Product],
    input: Tensor,
    weight: Tensor,
    geometry: tuple,
    options: MaskOptions,
    source: WeightSource,
) -> Plan:
    if options.path != "auto":
        return PLANS[options.path]
    # Compiled: a choice by sizes would recompile wherever the choice changes, and the compiler can
    # tune a plain product and fuse what follows. Layers that leave G to an optimizer always pack.
    # So does torch.func: its transforms handle torch's own products without a loop.
    if (
        not torch.compiler.is_compiling()
        and not (source.dense_gradient or source is MADE or source.fixed is not None)
        and "triton" in serving(options.backend, weight.device)
        and not is_transformed()
    ):
        return product.fastest(input, weight, source.recall is not None, *geometry)
    return PLANS["packed"]
