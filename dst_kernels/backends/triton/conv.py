"""Convolve over one or two dimensions, with gradients, and mask the weight while multiplying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...reference.conv import Geometry, conv_memory_format
from .conv_grad_weight import conv_grad_weight, conv_slabs
from .conv_product import Lattice, conv_product
from .conv_shapes import (
    Problem,
    as_kernel,
    as_linear,
    channels_to_the_end,
    channels_to_the_front,
    is_pointwise,
    planar,
    problem_of,
)
from .linear import (
    masked_linear,
    masked_linear_grad_input,
    masked_linear_grad_weight,
    refuse_float64,
    traits_of,
)
from .masking import ALONG_R, LAYER
from .matrix import Matrix, as_matrices, matrices_of
from .post import finish_threshold_gradient, post
from .tiles import (
    GradWeightTile,
    ProductTile,
    conv_grad_weight_candidates,
    conv_grad_weight_tile,
    conv_product_tile,
    conv_product_tiles,
    post_tile,
)
from .tuning import token_bucket, tuned, tuning_is_on
from .weight import effective_threshold


def masked_conv(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    reset_ratio: float | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Do as the reference; raise RuntimeError over three dimensions, TypeError for float64."""
    _check(input, weight, threshold)
    memory_format = conv_memory_format(input, weight)
    if memory_format == torch.channels_last and is_pointwise(weight, geometry, input):
        output, effective = masked_linear(
            channels_to_the_end(input),
            *as_linear(weight, threshold),
            bias,
            reset_ratio,
            traits_of(input, convolution=True),
        )
        return channels_to_the_front(output), effective.view_as(threshold)
    effective = effective_threshold(weight, threshold, reset_ratio)
    output = torch.empty(
        geometry.output_shape(input.shape, weight.shape),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format,
    )
    if output.numel() == 0:
        return output, effective
    problem = problem_of(weight, effective, geometry)
    bias = None if bias is None else bias.contiguous()
    _product(planar(input), problem, bias, planar(output), problem.lattices)
    return output, effective


def masked_conv_grad_input(
    grad: Tensor,
    input_shape: Sequence[int],
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Do as the reference; raise RuntimeError over three dimensions, TypeError for float64."""
    _check(grad, weight, threshold)
    memory_format = conv_memory_format(grad, weight)
    if memory_format == torch.channels_last and is_pointwise(weight, geometry, grad):
        result = masked_linear_grad_input(
            channels_to_the_end(grad), *as_linear(weight, threshold),
            traits_of(grad, convolution=True),
        )  # fmt: skip
        return channels_to_the_front(result)
    result = torch.empty(
        input_shape,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=memory_format,
    )
    problem = problem_of(weight, threshold, geometry)
    written, grad = planar(result), planar(grad)
    taps = problem.weight.shape[2:]
    dimensions = list(zip(taps, problem.stride, problem.padding, problem.dilation, strict=True))
    for row, column in itertools.product(*(range(step) for step in problem.stride)):
        residue = written[:, :, row :: problem.stride[0], column :: problem.stride[1]]
        if residue.numel() == 0:
            continue
        (up, vertical), (left, horizontal) = (
            _taps_of_residue(start, *dimension)
            for start, dimension in zip((row, column), dimensions, strict=True)
        )
        weight, threshold = problem.weight[:, :, up, left], problem.threshold
        if threshold.dim() > 1:
            threshold = threshold[:, :, up, left]
        part = problem._replace(weight=weight, threshold=threshold)
        _product(grad, part, None, residue, (vertical, horizontal), by_input=True)
    return result


def _taps_of_residue(
    residue: int, taps: int, stride: int, padding: int, dilation: int
) -> tuple[slice, Lattice]:
    """Return the taps that reach inputs residue, residue + stride, ..., and from which outputs.

    Tap k and output u meet at input u * stride - padding + k * dilation.
    """
    period = stride // math.gcd(stride, dilation)
    for tap in range(min(period, taps)):
        from_output = residue + padding - tap * dilation
        if from_output % stride == 0:
            lattice = Lattice(1, from_output // stride, -(period * dilation // stride))
            return slice(tap, None, period), lattice
    return slice(0, 0), Lattice(1, 0, 0)


def _product(
    x: Tensor,
    problem: Problem,
    bias: Tensor | None,
    out: Tensor,
    lattices: tuple[Lattice, Lattice],
    *,
    by_input: bool = False,
) -> None:
    traits = traits_of(x, convolution=True)

    def run(tile: ProductTile) -> None:
        conv_product(
            x, problem.weight, problem.threshold, bias, out, lattices, problem.groups,
            tile, traits.precision, by_input=by_input,
        )  # fmt: skip

    positions = out.shape[0] * out.shape[2] * out.shape[3]
    tile = conv_product_tile(positions, traits)
    if tuning_is_on():
        shape = "x".join(map(str, problem.weight.shape))
        name = (
            f"conv by_input={by_input} channels_last={x.stride(1) == 1} "
            f"element={problem.threshold.dim() > 1} "
            f"{token_bucket(positions)}x{shape} groups={problem.groups} {lattices} "
            f"{problem.weight.dtype} {traits}"
        )
        tile = tuned(name, tile, conv_product_tiles(traits), run, x)
    run(tile)


def masked_conv_grad_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    geometry: Geometry,
    surrogate: str,
    structure_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do as the reference; raise RuntimeError over three dimensions, TypeError for float64."""
    _check(input, weight, threshold)
    if is_pointwise(weight, geometry, grad, input):
        of_weight, of_threshold = masked_linear_grad_weight(
            channels_to_the_end(grad), channels_to_the_end(input),
            *as_linear(weight, threshold), surrogate, structure_gradient,
            traits_of(input, convolution=True),
        )  # fmt: skip
        return as_kernel(of_weight, weight), of_threshold.view_as(threshold)
    grad_weight = torch.empty_like(weight)
    if weight.numel() == 0:
        return grad_weight, torch.zeros_like(threshold)
    element_wise = threshold.shape == weight.shape
    seen = as_matrices(weight, threshold) if element_wise else as_matrices(weight)
    if seen is None:
        # A row is not one piece of memory: call this again with dense copies.
        dense = threshold.contiguous() if element_wise else threshold
        results = masked_conv_grad_weight(
            grad, input, weight.contiguous(), dense, geometry, surrogate, structure_gradient
        )
        return grad_weight.copy_(results[0]), torch.empty_like(threshold).copy_(results[1])
    grad_threshold = torch.empty_like(threshold) if element_wise else None
    partial = _grad_weight(
        planar(grad), planar(input),
        problem_of(weight, threshold, geometry),
        planar(grad_weight), None if grad_threshold is None else planar(grad_threshold),
        surrogate, structure_gradient,
    )  # fmt: skip
    if partial is None:
        return grad_weight, cast(Tensor, grad_threshold)
    axis = (ALONG_R if threshold.shape == weight.shape[:1] else LAYER).value
    return grad_weight, finish_threshold_gradient(partial, threshold, axis)


def _grad_weight(
    grad: Tensor,
    x: Tensor,
    problem: Problem,
    grad_weight: Tensor,
    grad_threshold: Tensor | None,
    surrogate: str,
    structure_gradient: bool,
) -> Tensor | None:
    weight, threshold, groups = problem.weight, problem.threshold, problem.groups
    traits = traits_of(x, convolution=True)
    options = surrogate, structure_gradient

    def run(tile: GradWeightTile) -> Tensor | None:
        if tile.split == 1:
            return conv_grad_weight(
                grad, x, weight, threshold, grad_weight, grad_threshold,
                problem.lattices, groups, *options, tile, traits.precision,
            )  # fmt: skip
        slabs = conv_slabs(grad, x, grad_weight, problem.lattices, groups, tile, traits.precision)
        matrix, written, dense = matrices_of(weight, grad_weight, slabs[0])
        if grad_threshold is None:
            rows, columns, axis = matrix.rows, matrix.columns, ALONG_R.value
            stored, into = Matrix(threshold, rows, columns, threshold.stride(0), 0, axis), None
        else:
            stored, into = matrices_of(threshold, grad_threshold)
        return post(
            dense, matrix, stored, written, into, *options,
            post_tile(matrix.columns, 1), slabs=len(slabs), slab_stride=slabs.stride(0),
        )  # fmt: skip

    positions = grad.shape[0] * grad.shape[2] * grad.shape[3]
    outputs, channels, *taps = weight.shape
    sizes = positions, outputs // groups, channels, math.prod(taps) * groups
    tile = conv_grad_weight_tile(*sizes, traits)
    if tuning_is_on():
        name = (
            f"conv grad_weight channels_last={x.stride(1) == 1} "
            f"element={grad_threshold is not None} {token_bucket(positions)}x"
            f"{'x'.join(map(str, weight.shape))} groups={groups} {problem.lattices} "
            f"{weight.dtype} {traits}"
        )
        candidates = conv_grad_weight_candidates(tile, traits)
        tile = tuned(name, tile, candidates, run, x)
    return run(tile)


def _check(activation: Tensor, weight: Tensor, threshold: Tensor) -> None:
    refuse_float64(activation, weight, threshold)
    if weight.dim() > 4:
        raise RuntimeError(
            "Triton's fused convolutions have one or two dimensions, but weight has "
            f"{weight.dim() - 2}: use path='packed' or path='auto'"
        )
