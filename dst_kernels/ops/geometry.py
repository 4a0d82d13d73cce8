"""Convert what torch's convolutions accept to what the ops take: numeric padding, tuples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def per_dimension(name: str, value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """Return one integer per spatial dimension, from one for all or a sequence of `spatial`."""
    if type(value) is tuple and len(value) == spatial and {*map(type, value)} == {int}:
        return value  # as layers have it
    values: tuple[Any, ...] = (value,) * spatial
    if isinstance(value, (tuple, list)):
        values = tuple(value)
    if len(values) == 1:
        values *= spatial
    integers = all([isinstance(v, (int, torch.SymInt)) for v in values])
    if len(values) != spatial or not integers:
        raise ValueError(f"{name} must be an integer or {spatial} integers, but is {value!r}")
    return values


def resolve_padding(
    input: Tensor,
    padding: str | int | Sequence[int],
    kernel_size: Sequence[int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """Return (input, numeric padding), with "same" and "valid" turned into numbers.

    If "same" needs one more element on one side, the returned input has it at the end, as in torch.
    """
    spatial = len(stride)
    if not isinstance(padding, str):
        return input, per_dimension("padding", padding, spatial)
    if padding == "valid":
        return input, (0,) * spatial
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid' or integers, but is {padding!r}")
    if any(step != 1 for step in stride):
        raise ValueError(f"padding='same' needs a stride of 1, but stride is {stride}")
    total = [step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True)]
    odd = [amount % 2 for amount in total]
    if any(odd):
        last_dimension_first = [side for extra in reversed(odd) for side in (0, extra)]
        input = F.pad(input, last_dimension_first)
    return input, tuple(amount // 2 for amount in total)
