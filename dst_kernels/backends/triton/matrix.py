"""View weights and thresholds as matrices, the only shape that kernels know (on the host)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import ALONG_C, ALONG_R, ELEMENT, LAYER


class Strided(NamedTuple):
    """Hold a matrix as kernels take it: its start, and the strides of rows and columns."""

    start: Tensor
    row: int
    column: int


class Matrix(NamedTuple):
    """Hold a tensor, seen as rows x columns; strides count elements.

    `axis` says along which of the two the values vary (for thresholds).
    """

    tensor: Tensor
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    axis: int = ELEMENT.value

    @property
    def strided(self) -> Strided:
        return Strided(self.tensor, self.row_stride, self.column_stride)

    def t(self) -> Matrix:
        """Return the transpose, without a copy."""
        axis = {ALONG_R.value: ALONG_C.value, ALONG_C.value: ALONG_R.value}.get(
            self.axis, self.axis
        )
        return Matrix(
            self.tensor, self.columns, self.rows, self.column_stride, self.row_stride, axis
        )


def as_matrices(*tensors: Tensor) -> list[Matrix] | None:
    """Return tensors of one shape [out, ...] as [out, all other dimensions] without a copy.

    Return None if that is impossible: see `matrix_strides`.
    """
    shape = tensors[0].shape
    if len(shape) == 2:
        return [Matrix(tensor, *shape, *tensor.stride()) for tensor in tensors]
    found = matrix_strides(shape, *[tensor.stride() for tensor in tensors])
    if found is None:
        return None
    sizes = shape[0], math.prod(shape[1:])
    return [Matrix(tensor, *sizes, *of) for tensor, of in zip(tensors, found, strict=True)]


def matrix_strides(
    shape: Sequence[int], *strides: tuple[int, ...]
) -> Sequence[Sequence[int]] | None:
    """Return the strides of rows and columns where tensors of one shape are seen as matrices.

    Return None if that is impossible: with more than two dimensions, each row must be one piece of
    memory, and its elements in the same order in all tensors.
    """
    if len(shape) == 2:
        return strides
    for of_tensor in strides:
        expected = 1
        for stride, size in sorted(zip(of_tensor[1:], shape[1:], strict=True)):
            if size != 1 and stride != expected:
                return None
            expected *= size
    orders = {
        tuple(stride for stride, size in zip(of_tensor[1:], shape[1:], strict=True) if size > 1)
        for of_tensor in strides
    }
    return None if len(orders) > 1 else [(of_tensor[0], 1) for of_tensor in strides]


def matrices_of(*tensors: Tensor) -> list[Matrix]:
    """Return `as_matrices` of tensors that need no copy for it."""
    found = as_matrices(*tensors)
    assert found is not None
    return found


def as_threshold(threshold: Tensor, weight: Matrix) -> Matrix:
    """Return a threshold with one value for each row, or one for all, as a matrix."""
    found = threshold_strides(weight.rows, threshold.shape, threshold.stride())
    return Matrix(threshold, weight.rows, weight.columns, *found)


def threshold_strides(
    rows: int, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, int, int]:
    """Return (row stride, column stride, axis) of a threshold for each row, or one for all."""
    if len(shape) == 1 and shape[0] == rows:
        return strides[0], 0, ALONG_R.value
    return 0, 0, LAYER.value


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of comparisons and gradients: float64 if one of these is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
