"""Multiply large float32 matrices on CPUs by oneDNN where it is faster than torch's BLAS.

torch has both, and takes its BLAS for float32. Where that is MKL, it has no AVX-512 on AMD's CPUs.
oneDNN has: on Zen 5 it takes half the time. On Zen 4, whose units are half as wide, it takes as
long for small weights, and a tenth to two fifths less for large ones.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import torch
from torch import Tensor

_LEAST = 1 << 17  # elements of a weight; calls of oneDNN take some 15 us more
_LEAST_ON_ZEN_4 = 1 << 20
_ZEN_5 = 26  # the processor's family
_FEWEST = 8  # inputs
_LARGE = 1 << 23  # elements of G: 32 MiB, from where the C library maps memory anew each time
_PIECE = 1 << 20  # elements of G that are made at a time, to be copied from the cache


def outruns_blas(input: Tensor, masked: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether oneDNN multiplies an input by this weight [out, in] faster."""
    return (
        masked.numel() >= _LEAST
        and masked.dtype is input.dtype is torch.float32
        and (bias is None or bias.dtype is torch.float32)
        and masked.is_cpu
        and masked.dim() == 2
        and input.shape[-1] == masked.shape[1]
        and input.numel() >= _FEWEST * masked.shape[1]
        and type(masked) is type(input) is Tensor  # subclasses expect torch's own operations
        and not torch.compiler.is_compiling()  # which chooses by itself, and could not trace this:
        and torch._C._get_mkldnn_enabled()
        and masked.numel() >= _least_on_this_machine()
    )


@functools.cache
def _least_on_this_machine() -> float:
    """Return the fewest elements of a weight that oneDNN multiplies faster."""
    file = Path("/proc/cpuinfo")
    cpus = file.read_text() if file.is_file() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", cpus, re.MULTILINE)
    if not (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in cpus
        and family is not None
    ):
        return math.inf
    return _LEAST if int(family[1]) >= _ZEN_5 else _LEAST_ON_ZEN_4


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input [..., in] times weight [out, in] transposed, plus bias; without autograd."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def weight_gradient(grad: Tensor, input: Tensor, memory: GradientMemory | None) -> Tensor:
    """Return G = dY^T X [out, in] from grad [tokens, out] and input [tokens, in].

    A large one is written to the `memory` of the last.
    """
    rows, columns = grad.shape[1], input.shape[1]
    left, right = grad.t(), input.t()
    if memory is None or rows * columns < _LARGE:
        return linear(left, right)
    result = memory.take((rows, columns))
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        result[start : start + step].copy_(linear(left[start : start + step], right))
    return result


class GradientMemory:
    """Hold the memory of a weight's float32 gradient from one step to the next.

    Large memory that is freed goes back to the system, and the first write to each of its pages
    takes twice as long as all of the gradient's arithmetic.
    """

    __slots__ = ("_spare",)

    def __init__(self) -> None:
        self._spare: list[Tensor] = []  # one or none: what a thread takes out is its own

    def take(self, shape: tuple[int, int]) -> Tensor:
        """Return a tensor to write to: in the same memory, unless another one still uses that."""
        try:
            tensor = self._spare.pop()
        except IndexError:
            tensor = torch.empty(shape)
        # Two are counted where nobody does: for the tensor, and for the storage asked here.
        if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2:
            tensor = torch.empty(shape)
        result = tensor.detach()  # a new one, which autograd may keep as the gradient
        if not self._spare:
            self._spare.append(tensor)
        return result
