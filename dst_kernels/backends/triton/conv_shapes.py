"""Reshape a convolution's tensors for the kernels: 1-d ones to 2-d, pointwise ones to matrices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.conv import Geometry
from .conv_product import Lattice


class Problem(NamedTuple):
    """Hold a convolution over two dimensions; one over one dimension has images of height 1.

    `threshold` has the weight's shape or is one for each filter.
    """

    weight: Tensor
    threshold: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def lattices(self) -> tuple[Lattice, Lattice]:
        """Return the lattices of the forward pass, vertical and horizontal."""
        vertical, horizontal = (
            Lattice(stride, -padding, dilation)
            for stride, padding, dilation in zip(
                self.stride, self.padding, self.dilation, strict=True
            )
        )
        return vertical, horizontal


def is_pointwise(weight: Tensor, geometry: Geometry, *activations: Tensor) -> bool:
    """Return whether it is a matrix product that needs no copy of its tensors."""
    one = all(size == 1 for size in (*weight.shape[2:], *geometry.stride, geometry.groups))
    if not one or any(geometry.padding) or weight.numel() == 0:
        return False
    return all(channels_to_the_end(tensor).is_contiguous() for tensor in activations)


def channels_to_the_end(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1)


def channels_to_the_front(tensor: Tensor) -> Tensor:
    """Return the tensor with channels first; no view for autograd: `relu_` may overwrite it."""
    front = tensor.movedim(-1, 1)
    return front.new_empty(0).set_(front.untyped_storage(), 0, front.shape, front.stride())


def as_linear(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands of a linear layer from those of a convolution with kernel size 1."""
    if threshold.shape == weight.shape:
        threshold = threshold.flatten(1)
    return weight.flatten(1), threshold


def as_kernel(matrix: Tensor, weight: Tensor) -> Tensor:
    """Return the matrix in the weight's shape and strides, so that autograd copies no gradient."""
    return matrix.as_strided(weight.shape, (*matrix.stride(), *weight.stride()[2:]))


def problem_of(weight: Tensor, threshold: Tensor, geometry: Geometry) -> Problem:
    if threshold.shape == weight.shape:
        threshold = planar(threshold)
    elif threshold.numel() == 1:
        threshold = threshold.reshape(1).expand(len(weight))
    stride, padding, dilation, groups = geometry
    if len(stride) == 1:
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return Problem(
        planar(weight), threshold, tuple(stride), tuple(padding), tuple(dilation), groups
    )


def planar(tensor: Tensor) -> Tensor:
    """Return [N, C, L] as [N, C, 1, L], and images unchanged."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
