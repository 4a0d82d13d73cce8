"""What every launcher needs: the tensors' device, Triton's names of dtypes."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["OPTIONS", "TRITON_DTYPES", "index_dtype", "on_device_of"]

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Of every launch. Triton 3.10 changes this default, and 3.9 warns who does not say.
OPTIONS = {"enable_fp_fusion": True}

_NOTHING = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def index_dtype(*extents: int) -> tl.dtype:
    """For offsets inside one tile, which are sums of two that stay below `extents`."""
    return tl.int32 if max(extents) < 2**30 else tl.int64
