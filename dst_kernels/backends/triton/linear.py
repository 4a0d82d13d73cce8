"""Compute the masked linear layer and its gradients, each in one pass over the weight."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from ...reference.linear import flatten_batch
from ..device import capability, tf32_allowed
from .grad_weight import dense_slabs, fused_grad_weight
from .masking import ELEMENT
from .matrix import Matrix, as_threshold, matrices_of
from .post import finish_threshold_gradient, post
from .product import masked_product
from .tiles import (
    GradWeightTile,
    ProductTile,
    Traits,
    grad_weight_candidates,
    grad_weight_tile,
    post_tile,
    product_candidates,
    product_tile,
)
from .tuning import token_bucket, tuned, tuning_is_on
from .weight import effective_threshold


def masked_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    traits: Traits | None = None,
) -> tuple[Tensor, Tensor]:
    """Do as the reference; raise TypeError for float64. Convolutions give their own `traits`."""
    refuse_float64(input, weight, threshold)
    x = flatten_batch(input)
    shape = *input.shape[:-1], weight.shape[0]
    if 0 in x.shape or 0 in weight.shape:
        output = x.new_zeros(shape)
        output = output if bias is None else output.add_(bias)
        return output, effective_threshold(weight, threshold, reset_ratio)
    if threshold.shape == weight.shape:
        effective = threshold.clone(memory_format=torch.contiguous_format)
    else:
        effective = torch.empty_like(threshold, memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    traits = traits or traits_of(x)
    output = _product(x, *_operands(weight, threshold), traits, bias, reset_ratio, effective)
    if effective.stride() != threshold.stride():
        effective = torch.empty_like(threshold).copy_(effective)
    return output.view(shape), effective


def _product(
    x: Tensor,
    weight: Matrix,
    threshold: Matrix,
    traits: Traits,
    bias: Tensor | None = None,
    reset_ratio: float | None = None,
    effective: Tensor | None = None,
) -> Tensor:
    def run(tile: ProductTile) -> Tensor:
        return masked_product(
            x, weight, threshold, bias, tile, traits.precision,
            reset_ratio=reset_ratio, effective=effective,
        )  # fmt: skip

    M, R, C = x.shape[0], weight.rows, weight.columns
    tile = product_tile(M, R, C, traits, threshold.axis == ELEMENT.value)
    if tuning_is_on():
        purpose = f"product guard={reset_ratio is not None} axis={threshold.axis}"
        problem = f"{purpose} {token_bucket(M)}x{R}x{C} {weight.tensor.dtype} {traits}"
        tile = tuned(problem, tile, product_candidates(tile, traits), run, x)
    return run(tile)


def masked_linear_grad_input(
    grad: Tensor, weight: Tensor, threshold: Tensor, traits: Traits | None = None
) -> Tensor:
    """Do as the reference; errors and `traits` are as in `masked_linear`."""
    refuse_float64(grad, weight, threshold)
    dy = flatten_batch(grad)
    if 0 in dy.shape or 0 in weight.shape:
        return grad.new_zeros((*grad.shape[:-1], weight.shape[1]))
    matrix, stored = (operand.t() for operand in _operands(weight, threshold))
    output = _product(dy, matrix, stored, traits or traits_of(dy))
    return output.view(*grad.shape[:-1], weight.shape[1])


def masked_linear_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    surrogate: str,
    structure_gradient: bool,
    traits: Traits | None = None,
) -> tuple[Tensor, Tensor]:
    """Do as the reference; errors and `traits` are as in `masked_linear`."""
    refuse_float64(grad, weight, threshold)
    dy, x = flatten_batch(grad), flatten_batch(input)
    grad_weight = torch.empty_like(weight)
    if 0 in weight.shape:
        return grad_weight, torch.zeros_like(threshold)
    matrix, stored = _operands(weight, threshold)
    (written,) = matrices_of(grad_weight)
    element_wise = threshold.shape == weight.shape
    grad_threshold = torch.empty_like(threshold) if element_wise else None
    into = None if grad_threshold is None else matrices_of(grad_threshold)[0]
    traits = traits or traits_of(x)

    def run(tile: GradWeightTile) -> Tensor | None:
        if tile.split == 1:
            return fused_grad_weight(
                dy, x, matrix, stored, written, into, surrogate, structure_gradient,
                tile, traits.precision,
            )  # fmt: skip
        slabs = dense_slabs(dy, x, tile, traits.precision)
        return post(
            Matrix(slabs, matrix.rows, matrix.columns, matrix.columns, 1),
            matrix, stored, written, into, surrogate, structure_gradient,
            post_tile(matrix.columns, 1), slabs=len(slabs), slab_stride=weight.numel(),
        )  # fmt: skip

    M, (R, C) = x.shape[0], weight.shape
    tile = grad_weight_tile(M, R, C, traits, element_wise)
    if tuning_is_on():
        purpose = f"grad_weight axis={stored.axis}"
        problem = f"{purpose} {token_bucket(M)}x{R}x{C} {weight.dtype} {traits}"
        candidates = grad_weight_candidates(tile, traits, element_wise)
        tile = tuned(problem, tile, candidates, run, x)
    partial = run(tile)
    if partial is None:
        return grad_weight, cast(Tensor, grad_threshold)
    return grad_weight, finish_threshold_gradient(partial, threshold, stored.axis)


def _operands(weight: Tensor, threshold: Tensor) -> tuple[Matrix, Matrix]:
    if threshold.shape == weight.shape:
        matrix, stored = matrices_of(weight, threshold)
        return matrix, stored
    (matrix,) = matrices_of(weight)
    return matrix, as_threshold(threshold, matrix)


def traits_of(activation: Tensor, *, convolution: bool = False) -> Traits:
    found = capability(activation.device)
    hopper = found is None or found[0] == 9  # the interpreter runs the tiles for Hopper
    tf32 = activation.dtype is torch.float32 and tf32_allowed(convolution=convolution)
    return _traits(activation.dtype, tf32, hopper)


_traits = functools.cache(Traits)


def refuse_float64(activation: Tensor, weight: Tensor, threshold: Tensor) -> None:
    dtypes = activation.dtype, weight.dtype, threshold.dtype
    if torch.float64 in dtypes:
        name = ("input", "weight", "threshold")[dtypes.index(torch.float64)]
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32 for Triton's fused products, but its "
            "dtype is torch.float64. Use path='packed' or 'auto', or backend='reference'."
        )
