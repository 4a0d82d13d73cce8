"""Multiply by a sparse weight: by the library's ops on a CPU, else by the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference
from ...reference.conv import Geometry, conv_memory_format
from ...reference.kept import KeptPlaces, KeptRows, new_kept_rows

_ops = torch.ops.dst_kernels_compiled
_linear, _conv = _ops.sparse_linear.default, _ops.sparse_conv.default
_kept_rows, _kept_linear = _ops.kept_rows.default, _ops.kept_linear.default
_kept_linear_grad_input = _ops.kept_linear_grad_input.default
_kept_conv, _kept_conv_grad_input = _ops.kept_conv.default, _ops.kept_conv_grad_input.default
_kept_linear_grad_weight = _ops.kept_linear_grad_weight.default
_kept_conv_grad_weight = _ops.kept_conv_grad_weight.default
_kept_columns, _kept_values = _ops.kept_columns.default, _ops.kept_values.default
_kept_dense = _ops.kept_dense.default
_DTYPES = (torch.float32, torch.bfloat16)
# What does the same as a function of this module for tensors of these dtypes on a CPU.
DIRECT = {"sparse_linear": (_linear._op, _DTYPES)}
_MOST = 1 << 30  # elements of an image: the library's offsets are 32-bit integers


def sparse_linear(
    input: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (input.is_cpu and input.dtype in _DTYPES):
        return reference.sparse_linear(input, values, columns, row_starts, bias)
    return _linear(input, values, columns, row_starts, bias)


def sparse_conv(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not _takes(input):
        args = input, values, columns, row_starts, bias, kernel_size, geometry
        return reference.sparse_conv(*args)
    images, numbers = _as_images(input, kernel_size, geometry)
    return _like(input, _conv(images, values, columns, row_starts, bias, numbers))


def kept_rows(masked: Tensor, most: int) -> KeptRows | None:
    """Do as the reference does, but judge by a sample of rows, and keep a NaN."""
    if not (masked.is_cpu and masked.dtype in (*_DTYPES, torch.float64)):
        return reference.kept_rows(masked, most)
    rows = new_kept_rows(masked)
    return rows if _kept_rows(masked, most, *rows) else None


def kept_linear(input: Tensor, rows: KeptRows, bias: Tensor | None) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (input.is_cpu and input.dtype in _DTYPES):
        return reference.kept_linear(input, rows, bias)
    return _kept_linear(input.contiguous(), *rows, bias)


def kept_linear_grad_input(grad: Tensor, rows: KeptRows) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (grad.is_cpu and grad.dtype in _DTYPES):
        return reference.kept_linear_grad_input(grad, rows)
    return _kept_linear_grad_input(grad.contiguous(), *rows)


def kept_conv(
    input: Tensor,
    rows: KeptRows,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not _takes(input):
        return reference.kept_conv(input, rows, bias, kernel_size, geometry)
    images, numbers = _as_images(input, kernel_size, geometry)
    return _like(input, _kept_conv(images, *rows, bias, numbers))


def kept_conv_grad_input(
    grad: Tensor, like: Tensor, rows: KeptRows, kernel_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (_takes(grad) and like[:1].numel() < _MOST):
        return reference.kept_conv_grad_input(grad, like, rows, kernel_size, geometry)
    images, numbers = _as_images(grad, kernel_size, geometry)
    channels, *size = like.shape[1:]
    shape = (channels, 1, *size) if len(size) == 1 else (channels, *size)
    return _kept_conv_grad_input(images, *rows, numbers, shape).view(like.shape)


def kept_conv_grad_weight(
    grad: Tensor, input: Tensor, where: KeptPlaces, kernel_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (_takes(grad) and _takes(input)):
        return reference.kept_conv_grad_weight(grad, input, where, kernel_size, geometry)
    values = grad.new_empty(where.kept)
    columns, places, _ = where
    images, numbers = _as_images(input, kernel_size, geometry)
    grads, _ = _as_images(grad, kernel_size, geometry)
    _kept_conv_grad_weight(grads, images, columns, places, values, numbers)
    return values


def _takes(images: Tensor) -> bool:
    """Return whether the library convolves these."""
    return images.is_cpu and images.dtype in _DTYPES and images[:1].numel() < _MOST


def _as_images(
    input: Tensor, kernel_size: Sequence[int], geometry: Geometry
) -> tuple[Tensor, tuple[int, ...]]:
    """Return contiguous images, or lines as images of one, and the geometry in numbers."""
    stride, padding, dilation, groups = geometry
    if input.dim() == 3:
        numbers = (1, *kernel_size, 1, *stride, 0, *padding, 1, *dilation, groups)
        return input.unsqueeze(2).contiguous(), numbers
    return input.contiguous(), (*kernel_size, *stride, *padding, *dilation, groups)


def _like(input: Tensor, output: Tensor) -> Tensor:
    """Return the output of images with the dimensions and the memory format of the input."""
    if input.dim() == 3:
        return output.squeeze(2)
    return output.contiguous(memory_format=conv_memory_format(input, input))


def kept_linear_grad_weight(grad: Tensor, input: Tensor, where: KeptPlaces) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (grad.is_cpu and grad.dtype in _DTYPES):
        return reference.kept_linear_grad_weight(grad, input, where)
    values = grad.new_empty(where.kept)
    columns, places, _ = where
    _kept_linear_grad_weight(grad.contiguous(), input.contiguous(), columns, places, values)
    return values


def kept_places(mask: Tensor) -> KeptPlaces:
    """Do as the reference does; it also looks where the library does not."""
    if not mask.is_cpu:
        return reference.kept_places(mask)
    _, columns, places = new_kept_rows(mask)
    return KeptPlaces(columns, places, _kept_columns(mask, columns, places))


def kept_values(weight: Tensor, where: KeptPlaces) -> Tensor:
    """Do as the reference does; it also reads what the library does not."""
    if not weight.is_cpu:
        return reference.kept_values(weight, where)
    columns, places, kept = where
    values = weight.new_empty(kept)
    _kept_values(weight.contiguous(), columns, places, values)
    return values


def kept_dense(values: Tensor, where: KeptPlaces, shape: Sequence[int]) -> Tensor:
    """Do as the reference does; it also writes what the library does not."""
    if not values.is_cpu:
        return reference.kept_dense(values, where, shape)
    columns, places, _ = where
    dense = values.new_empty(shape)
    _kept_dense(values.contiguous(), columns, places, dense, True)
    return dense


def kept_write_(dense: Tensor, values: Tensor, where: KeptPlaces) -> None:
    """Do as the reference does; it also writes what the library does not."""
    if not values.is_cpu:
        return reference.kept_write_(dense, values, where)
    columns, places, _ = where
    _kept_dense(values, columns, places, dense, False)
    return None
