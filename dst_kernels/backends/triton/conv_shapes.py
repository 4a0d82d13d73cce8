"""A convolution's tensors as the kernels take them: images for lines, matrices where it is one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.conv import Geometry
from .conv_product import Lattice


class Problem(NamedTuple):
    """A convolution as the kernels take it: over two dimensions, a line being an image one high.

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
        """Of the forward pass."""
        vertical, horizontal = (
            Lattice(stride, -padding, dilation)
            for stride, padding, dilation in zip(
                self.stride, self.padding, self.dilation, strict=True
            )
        )
        return vertical, horizontal


def is_pointwise(weight: Tensor, geometry: Geometry, *activations: Tensor) -> bool:
    """Whether it is a matrix product of the tensors as they lie in memory."""
    one = all(size == 1 for size in (*weight.shape[2:], *geometry.stride, geometry.groups))
    if not one or any(geometry.padding) or weight.numel() == 0:
        return False
    return all(channels_to_the_end(tensor).is_contiguous() for tensor in activations)


def channels_to_the_end(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1)


def channels_to_the_front(tensor: Tensor) -> Tensor:
    """No view in autograd's eyes, so that callers may overwrite it (`relu_`)."""
    front = tensor.movedim(-1, 1)
    return front.new_empty(0).set_(front.untyped_storage(), 0, front.shape, front.stride())


def as_linear(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Of a convolution whose kernel is one element."""
    if threshold.shape == weight.shape:
        threshold = threshold.flatten(1)
    return weight.flatten(1), threshold


def as_kernel(matrix: Tensor, weight: Tensor) -> Tensor:
    """With the weight's own strides where a dimension is 1, lest autograd copies the gradient."""
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
    """[N, C, L] as [N, C, 1, L]; images as they are."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
