"""Multiply by a sparse weight: by the library's ops on a CPU, else by the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference
from ...reference.conv import Geometry, conv_memory_format

_linear = torch.ops.dst_kernels_compiled.sparse_linear.default
_conv = torch.ops.dst_kernels_compiled.sparse_conv.default
_DTYPES = (torch.float32, torch.bfloat16)
_MOST = 1 << 30  # elements of an image: the library's offsets are 32-bit integers


def sparse_linear(
    input: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None
) -> Tensor:
    """Do as the reference does; it also computes what the library does not take."""
    if not (input.is_cpu and input.dtype in _DTYPES):
        return reference.sparse_linear(input, values, columns, row_starts, bias)
    return _linear(input.contiguous(), values, columns, row_starts, bias)


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
    if not (input.is_cpu and input.dtype in _DTYPES and input[:1].numel() < _MOST):
        args = input, values, columns, row_starts, bias, kernel_size, geometry
        return reference.sparse_conv(*args)
    stride, padding, dilation, groups = geometry
    if input.dim() == 3:  # as one line of an image
        output = _conv(
            input.unsqueeze(2).contiguous(), values, columns, row_starts, bias,
            (1, *kernel_size, 1, *stride, 0, *padding, 1, *dilation, groups),
        )  # fmt: skip
        return output.squeeze(2)
    output = _conv(
        input.contiguous(), values, columns, row_starts, bias,
        (*kernel_size, *stride, *padding, *dilation, groups),
    )  # fmt: skip
    return output.contiguous(memory_format=conv_memory_format(input, input))
