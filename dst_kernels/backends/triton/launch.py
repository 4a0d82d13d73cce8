"""Hold what every launcher needs: the tensors' device, Triton's dtypes, a product's TILE."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...reference.weight import largest_collapsed_count

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# For every launch. Triton 3.10 changes this default, and 3.9 warns if it is not given.
OPTIONS = {"enable_fp_fusion": True}


class CompiledTile(NamedTuple):
    """Hold all that a product's kernel is compiled for, its tile among it: the kernels' TILE."""

    precision: str
    index: tl.dtype
    block_m: int
    block_r: int
    block_c: int
    group: int
    unroll: int = 1
    pieces: int = 1


_NOTHING = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which Triton launches on the tensor's device: it takes the current."""
    index = tensor.get_device()  # -1 for a CPU
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; `triton.cdiv` takes a dozen times as long on the host."""
    return -(-a // b)


def odd(size: int) -> int:
    """Return 2 size + 1, for a size in a tuple of a kernel's that varies from call to call.

    Triton compiles anew where an integer is 1 or a multiple of 16, which would stop a training, or
    the capture of a graph, at the first batch of another size. `do_not_specialize` keeps it from
    that for arguments, but not for the members of tuples. A kernel takes `>> 1` of this.
    """
    return 2 * size + 1


@functools.lru_cache(maxsize=4096)
def least_pruned(size: int, reset_ratio: float) -> int:
    """Return how many of `size` weights must at least be pruned for the guard to reset."""
    return size - largest_collapsed_count(size, reset_ratio)


def index_dtype(*extents: int) -> tl.dtype:
    """Return the dtype of offsets inside one tile; each is a sum of two below max(extents)."""
    return tl.int32 if max(extents) < 2**30 else tl.int64
