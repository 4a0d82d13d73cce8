"""Multiply by a weight in training of which only the kept elements are stored, row by row.

Elements that are not stored have no part in the output: they give 0 even where the input is
infinite or NaN. For dX they may count as zeros: an infinite gradient may then give NaN.
Products of 16-bit tensors are summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .conv import Geometry, conv_dense_weight_gradient, conv_grad_input
from .linear import dense_weight_gradient, flatten_batch
from .sparse import dense_weight, sparse_conv, sparse_linear


class KeptRows(NamedTuple):
    """Hold the kept elements of a weight [rows, *row_shape], flattened to [rows, columns].

    Row i has `values.flatten()[begin:end]` in `columns.flatten()[begin:end]`, ascending, where
    begin, end = `places[i]`. All else in both is undefined. `values` has the weight's shape (or is
    [kept], with `KeptPlaces`), `columns` is [rows, columns] (uint16, or int32 where there are more
    than 65,536), `places` int32 [rows, 2].
    """

    values: Tensor
    columns: Tensor
    places: Tensor


class KeptPlaces(NamedTuple):
    """Hold where a boolean mask is True: the columns and places of `KeptRows`, without gaps.

    `kept` is the number of elements. Values for these places are tensors [kept].
    """

    columns: Tensor
    places: Tensor
    kept: int

    def flat(self) -> Tensor:
        """Return the index of each kept element in the flattened weight, int64 [kept]."""
        rows, columns = self.columns.shape
        counts = self.places[:, 1] - self.places[:, 0]
        first = torch.arange(rows, device=counts.device) * columns
        starts = first.repeat_interleave(counts, output_size=self.kept)
        return starts + self.columns.view(-1)[: self.kept].to(torch.int64)


def new_kept_rows(masked: Tensor) -> KeptRows:
    """Return the memory for the kept elements of `masked`, which is contiguous, not yet written."""
    rows = masked.shape[0]
    columns = masked.numel() // rows if rows else 0
    of_columns = torch.uint16 if columns <= 1 << 16 else torch.int32
    empty = masked.new_empty
    return KeptRows(
        torch.empty_like(masked),
        empty(rows, columns, dtype=of_columns),
        empty(rows, 2, dtype=torch.int32),
    )


def kept_rows(masked: Tensor, most: int) -> KeptRows | None:
    """Return the elements of `masked` that are not 0, or None if there are more than `most`.

    Other backends may judge by a sample of its rows.
    """
    kept = masked.flatten(1) != 0
    ends = kept.sum(1).cumsum(0)
    if len(ends) and ends[-1] > most:
        return None
    made = new_kept_rows(masked)
    count = int(ends[-1]) if len(ends) else 0
    made.values.view(-1)[:count] = masked.flatten(1)[kept]
    made.columns.view(-1)[:count] = kept.nonzero()[:, 1].to(made.columns.dtype)
    made.places[:, 1] = ends
    made.places[:, 0] = ends - kept.sum(1)
    return made


def kept_places(mask: Tensor) -> KeptPlaces:
    """Return where `mask` [rows, *row_shape], which is contiguous, is True."""
    _, columns, places = new_kept_rows(mask)
    ends = mask.flatten(1).sum(1).cumsum(0)
    kept = int(ends[-1]) if len(ends) else 0
    columns.view(-1)[:kept] = mask.flatten(1).nonzero()[:, 1].to(columns.dtype)
    places[1:, 0] = ends[:-1]
    places[:1, 0] = 0
    places[:, 1] = ends
    return KeptPlaces(columns, places, kept)


def kept_values(weight: Tensor, where: KeptPlaces) -> Tensor:
    """Return the kept elements of a weight, [kept]."""
    return weight.reshape(-1)[where.flat()]


def kept_dense(values: Tensor, where: KeptPlaces, shape: Sequence[int]) -> Tensor:
    """Return a weight of this shape from its kept elements, and 0 elsewhere."""
    dense = values.new_zeros(where.columns.numel())
    return dense.index_copy(0, where.flat(), values).view(shape)


def kept_write_(dense: Tensor, values: Tensor, where: KeptPlaces) -> None:
    """Write kept elements, of the dtype of `dense`, into a contiguous weight."""
    dense.view(-1).index_copy_(0, where.flat(), values)


def dense_rows(rows: KeptRows) -> Tensor:
    """Return the weight, with 0 where nothing is kept."""
    return dense_weight(*_one_after_the_other(rows), rows.values.shape[1:])


def kept_linear(input: Tensor, rows: KeptRows, bias: Tensor | None) -> Tensor:
    """Return input [..., columns] times the weight, transposed, plus bias [rows]: [..., rows]."""
    return sparse_linear(input, *_one_after_the_other(rows), bias)


def kept_linear_grad_input(grad: Tensor, rows: KeptRows) -> Tensor:
    """Return dX [..., columns] = dY W from grad [..., rows]."""
    weight = dense_weight(*_one_after_the_other(rows), rows.columns.shape[1:])
    wide = torch.promote_types(grad.dtype, torch.float32)
    result = flatten_batch(grad).to(wide) @ weight.to(wide)
    return result.to(grad.dtype).reshape(*grad.shape[:-1], weight.shape[1])


def kept_linear_grad_weight(grad: Tensor, input: Tensor, where: KeptPlaces) -> Tensor:
    """Return dW = dY^T X from grad [..., rows] and input [..., columns], where it is kept."""
    return kept_values(dense_weight_gradient(grad, input), where)


def kept_conv(
    input: Tensor,
    rows: KeptRows,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Convolve [N, in, *spatial] over 1 or 2 dimensions; a row is [in/groups, *kernel_size].

    Return [N, out, *spatial'], contiguous, or channels last if the input is.
    """
    return sparse_conv(input, *_one_after_the_other(rows), bias, kernel_size, geometry)


def kept_conv_grad_input(
    grad: Tensor, like: Tensor, rows: KeptRows, kernel_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Return dX, contiguous, of the shape of the input `like`."""
    row_shape = like.shape[1] // geometry.groups, *kernel_size
    weight = dense_weight(*_one_after_the_other(rows), row_shape)
    wide = torch.promote_types(grad.dtype, torch.float32)
    result = conv_grad_input(grad.to(wide), like.to(wide), weight.to(wide), geometry)
    return result.to(grad.dtype).contiguous()


def kept_conv_grad_weight(
    grad: Tensor, input: Tensor, where: KeptPlaces, kernel_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Return dW from grad [N, out, *spatial'] and input [N, in, *spatial], where it is kept."""
    shape = grad.shape[1], input.shape[1] // geometry.groups, *kernel_size
    weight = grad.new_empty(shape)  # its shape alone is used
    return kept_values(conv_dense_weight_gradient(grad, input, weight, geometry), where)


def _one_after_the_other(rows: KeptRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, columns and row starts without what lies between rows."""
    begin, end = rows.places.to(torch.int64).unbind(1)
    counts = end - begin
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = counts.cumsum(0)
    total = int(starts[-1])
    shift = (begin - starts[:-1]).repeat_interleave(counts, output_size=total)
    places = torch.arange(total, device=counts.device) + shift
    columns = rows.columns.view(-1).to(torch.int64)[places].to(rows.columns.dtype)
    return rows.values.view(-1)[places], columns, starts
