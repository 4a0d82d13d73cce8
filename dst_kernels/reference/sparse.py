"""Multiply by a weight of which only the nonzero elements are stored, row by row (CSR).

`values` [kept] has the elements of the weight, flattened to [rows, columns], in the order of rows,
`columns` [kept] their columns, ascending within a row, in uint16 or int32, and `row_starts`
[rows + 1] (int32) where each row begins, and at last where the last one ends. Elements that are
not stored have no part in a sum: they give 0 even where the input is infinite or NaN. Products of
16-bit tensors are summed in float32.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import Geometry, conv_memory_format
from .linear import flatten_batch


def dense_weight(
    values: Tensor, columns: Tensor, row_starts: Tensor, row_shape: Sequence[int]
) -> Tensor:
    """Return the weight [rows, *row_shape], with 0 where nothing is stored."""
    rows = _rows_of(row_starts, len(values))
    dense = values.new_zeros(len(row_starts) - 1, math.prod(row_shape))
    dense[rows, columns.to(torch.int64)] = values
    return dense.view(-1, *row_shape)


def sparse_linear(
    input: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None
) -> Tensor:
    """Return input [..., columns] times the weight, transposed, plus bias [rows]: [..., rows]."""
    output = _product(values, columns, row_starts, flatten_batch(input).t())
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None]
    output = output.t().to(input.dtype).contiguous()
    return output.reshape(*input.shape[:-1], len(row_starts) - 1)


def sparse_conv(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Convolve [N, in, *spatial] over 1 or 2 dimensions; a row is [in/groups, *kernel_size].

    Return [N, out, *spatial'], contiguous, or channels last if the input is.
    """
    rows = len(row_starts) - 1
    shape = geometry.output_shape(input.shape, [rows, 0, *kernel_size])
    batch, groups = input.shape[0], geometry.groups
    images = input.to(torch.promote_types(input.dtype, torch.float32))
    stride, padding, dilation = (tuple(each) for each in geometry[:3])
    if input.dim() == 3:  # as one line of an image
        images, kernel_size = images.unsqueeze(2), (1, *kernel_size)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    length = math.prod(shape[2:])
    patches = F.unfold(images, tuple(kernel_size), dilation, padding, stride)
    patches = patches.transpose(0, 1).reshape(patches.shape[1], batch * length)
    if groups > 1:
        group = _rows_of(row_starts, len(values)) // (rows // groups)
        columns = (columns.to(torch.int64) + group * (len(patches) // groups)).to(torch.int32)
    output = _product(values, columns, row_starts, patches)
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None]
    output = output.view(rows, batch, length).transpose(0, 1).reshape(shape).to(input.dtype)
    return output.contiguous(memory_format=conv_memory_format(input, input))


def _rows_of(row_starts: Tensor, kept: int) -> Tensor:
    """Return the row of each stored element [kept], int64."""
    rows = torch.arange(len(row_starts) - 1, device=row_starts.device)
    return rows.repeat_interleave(row_starts.diff().to(torch.int64), output_size=kept)


def _product(values: Tensor, columns: Tensor, row_starts: Tensor, right: Tensor) -> Tensor:
    """Return the weight times `right` [columns, n]: [rows, n], in at least float32."""
    wide = torch.promote_types(values.dtype, torch.float32)
    size = len(row_starts) - 1, right.shape[0]
    # What torch's product does not take: nothing to add up, or tensors without data.
    if 0 in (*size, right.shape[1], len(values)) or right.is_meta:
        return right.new_zeros(size[0], right.shape[1], dtype=wide)
    _expect_beta_state()
    parts = row_starts, columns.to(torch.int32), values.to(wide)
    return torch.sparse_csr_tensor(*parts, size, check_invariants=False) @ right.to(wide)


@functools.cache
def _expect_beta_state() -> None:
    """Let torch say once, unheard, that sparse CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), zero[:0], zero[:0], (1, 1))
