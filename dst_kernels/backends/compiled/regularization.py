"""Compute the sparse regulariser by the libraries' op: value and slopes of many thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference

_regularization = torch.ops.dst_kernels_compiled.regularization.default


def regularization(thresholds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Do as the reference does; it also computes what the library does not take.

    That is mixed or 16-bit dtypes and strided thresholds, which layers rarely have.
    """
    dtype = thresholds[0].dtype
    usual = dtype in (torch.float32, torch.float64)
    if not usual or any(t.dtype != dtype or not t.is_contiguous() for t in thresholds):
        return reference.regularization(thresholds)
    sizes = [threshold.numel() for threshold in thresholds]
    slopes = thresholds[0].new_empty(sum(sizes))
    value = thresholds[0].new_empty(())
    _regularization(thresholds, value, slopes.split(sizes))
    return value, slopes
