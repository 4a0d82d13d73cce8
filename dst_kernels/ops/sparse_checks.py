"""Check what products with a sparse weight accept; see `checks.py` and `reference/sparse.py`.

Columns are not looked at, which would cost as much as the product: layers do so when they are made
or loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import REAL, REAL_DTYPES
from ..reference.conv import Geometry
from .checks import check_type, check_value
from .conv_checks import check_shapes

COLUMN_DTYPES = (torch.uint16, torch.int32)


def check_sparse_linear(
    input: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None
) -> None:
    _check_parts(input, values, columns, row_starts, bias)
    check_value(
        input.dim() >= 1,
        lambda: f"input must have shape [..., columns], but its shape is {list(input.shape)}",
    )


def check_sparse_conv(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> None:
    _check_parts(input, values, columns, row_starts, bias)
    groups = geometry.groups
    check_value(
        len(kernel_size) == len(geometry.stride) in (1, 2),
        lambda: f"kernel_size must be 1 or 2 integers, but is {tuple(kernel_size)}",
    )
    check_value(
        groups >= 1 and input.dim() > 1 and input.shape[1] % groups == 0,
        lambda: (
            f"groups must be at least 1 and divide the input's channels, but is {groups} for an "
            f"input of shape {list(input.shape)}"
        ),
    )
    weight_shape = [row_starts.shape[0] - 1, input.shape[1] // groups, *kernel_size]
    check_shapes(input.shape, weight_shape, geometry)


def _check_parts(
    input: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None
) -> None:
    check_type(
        input.dtype in REAL_DTYPES,
        lambda: f"input must be {REAL}, but its dtype is {input.dtype}",
    )
    check_type(
        values.dtype == input.dtype,
        lambda: f"values must have the input's dtype {input.dtype}, but theirs is {values.dtype}",
    )
    check_type(
        columns.dtype in COLUMN_DTYPES,
        lambda: f"columns must be uint16 or int32, but their dtype is {columns.dtype}",
    )
    check_type(
        row_starts.dtype == torch.int32,
        lambda: f"row_starts must be int32, but their dtype is {row_starts.dtype}",
    )
    check_value(
        values.dim() == 1 and columns.shape == values.shape,
        lambda: (
            "values and columns must be as long as each other, but their shapes are "
            f"{list(values.shape)} and {list(columns.shape)}"
        ),
    )
    check_value(
        row_starts.dim() == 1 and row_starts.shape[0] >= 1,
        lambda: f"row_starts must have shape [rows + 1], but it is {list(row_starts.shape)}",
    )
    rows = row_starts.shape[0] - 1
    if bias is not None:
        given = list(bias.shape)
        check_value(
            len(given) == 1 and given[0] == rows,
            lambda: f"bias must have shape [{rows}], but its shape is {given}",
        )
    for name, part in (("values", values), ("columns", columns), ("row_starts", row_starts)):
        check_value(
            part.device == input.device,
            lambda name=name, part=part: (  # type: ignore[misc]  # defaults
                f"{name} must be on the input's device {input.device}, but is on {part.device}"
            ),
        )
