"""What a GPU is assumed to do, and how long kernels take by that: the arithmetic of predictions.

A kernel takes the longer of its arithmetic and its traffic, and a floor for each launch. Every
number that was not measured is here, with its source. "performance" is the project's reading of
datasheets and publications; an assumption has no better source than experience.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dst_kernels.plan.estimate import (
    _FLOAT32_FLOPS,
    _GRADIENT_PRODUCT,
    _LAUNCH,
    _MASKED_PRODUCT,
    _MASKED_PRODUCT_NO_CAST,
    _TF32_FLOPS,
)

from .errors import require_one_of

__all__ = [
    "ATTENTION",
    "COMPILED_CALL",
    "CONVOLUTION",
    "DEPTHWISE",
    "EPILOGUE",
    "GRADIENT_PRODUCT",
    "HOST_PER_COMPILED_LAUNCH",
    "HOST_PER_DEFERRED_LAYER",
    "HOST_PER_GROUPED_LAYER",
    "HOST_PER_LAUNCH",
    "HOST_PER_OP",
    "HOST_PER_SYNC",
    "MACHINES",
    "TILE",
    "TRITON_CONVOLUTION",
    "Figure",
    "Kernel",
    "Machine",
    "gpu_time",
    "machine_named",
    "masked_product",
    "optimizer_bytes",
    "optimizer_launches",
    "total_bytes",
    "total_launches",
]

Figure = tuple[str, str, str, float, str]
"""(provider, pass, metric, value, unit), as rows of results have them"""


@dataclass(frozen=True)
class Machine:
    """A GPU, as its libraries get to see it.

    Args:
        name: of the device as torch reports it.
        copy: bytes a second, read and written, of a copy far beyond L2.
        bf16: FLOP/s of cuBLAS in a product of 8192 cubed on random data; float16 is the same.
        l2: bytes that stay in the cache from one replay of a CUDA graph to the next.
        l2_speed: bytes a second from there.
    """

    name: str
    copy: float
    bf16: float
    l2: int
    l2_speed: float

    def flops(self, dtype: torch.dtype, tf32: bool) -> float:
        """FLOP/s of products in a dtype."""
        if dtype == torch.float32:
            return _TF32_FLOPS if tf32 else _FLOAT32_FLOPS  # of the planner's estimate
        return self.bf16


# Both `copy` and `bf16` were read earlier on such machines, by others (performance, section 1, for
# the H200). L2: 50 MB in the datasheets. Its speed: an assumption, between the 5.5 to 6 TB/s that
# microbenchmarks of an H100 publish for reads and what a kernel that also writes can expect.
MACHINES = {
    "h100": Machine("NVIDIA H100 80GB HBM3", copy=3.0e12, bf16=798e12, l2=50 << 20, l2_speed=5e12),
    "h200": Machine("NVIDIA H200", copy=4.3e12, bf16=788e12, l2=50 << 20, l2_speed=5e12),
}


def machine_named(name: str) -> Machine:
    """Raises UsageError for an unknown name."""
    require_one_of("--gpu", name, list(MACHINES))
    return MACHINES[name]


# -- shares of the speed that cuBLAS reaches at its best -------------------------------------------

GRADIENT_PRODUCT = _GRADIENT_PRODUCT  # as the planner estimates
CONVOLUTION = 0.33  # assumption: cuDNN's, from the conv steps assumed there in section 6
TRITON_CONVOLUTION = 0.75  # assumption, of cuDNN's: 0.4 to 0.87 published (performance, section 6)
DEPTHWISE = 0.1  # assumption, of float32 without tensor cores: one filter for each channel
TILE = 64  # columns of a tile of ours, of which a filter for each channel uses one
EPILOGUE = 0.25  # of the traffic of a fused dW's epilogue: what overlaps with no product (planner)
ATTENTION = 0.45  # assumption: flash attention of 64 channels a head, both directions


def masked_product(casts: bool) -> float:
    """Of a product that masks its left operand in registers, as the planner estimates."""
    return _MASKED_PRODUCT if casts else _MASKED_PRODUCT_NO_CAST


# -- the host, in seconds (performance, sections 1 and 10, but for assumptions) --------------------

HOST_PER_LAUNCH = 5e-6  # an eager call of ATen, autograd's part included
HOST_PER_COMPILED_LAUNCH = 7e-6  # Inductor's: 6.8 to 9.1 published
COMPILED_CALL = 40e-6  # guards and wrappers of one call of a compiled module: 33 to 44 published
HOST_PER_OP = 30e-6  # each op of ours, beside its launches: measured in tiny layers on a CPU
HOST_PER_GROUPED_LAYER = 20e-6  # forward, backward and step of a layer that finds its masked weight
HOST_PER_DEFERRED_LAYER = 15e-6  # made, beside its launches: measured on a CPU, too
HOST_PER_SYNC = (
    20e-6  # assumption: .item() waits, comes back, and the GPU waits for the next launch
)


# -- kernels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One launch, or some that belong together.

    Args:
        name: of the op.
        bytes: read and written.
        flops: of its products; 0 for a kernel that only streams.
        dtype: of its products. tf32: whether those of float32 are rounded to it.
        share: of cuBLAS's speed that its arithmetic reaches.
        launches: how many.
        reads, writes: pairs of a tensor's number and bytes, where known: what fusing goes by.
    """

    name: str
    bytes: float
    flops: float = 0
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    share: float = 1.0
    launches: int = 1
    reads: tuple[tuple[int, int], ...] = ()
    writes: tuple[tuple[int, int], ...] = ()

    def seconds(self, machine: Machine, bandwidth: float) -> float:
        arithmetic = self.flops / (machine.flops(self.dtype, self.tf32) * self.share)
        return max(arithmetic, self.bytes / bandwidth) + self.launches * _LAUNCH


def gpu_time(kernels: Sequence[Kernel], machine: Machine, *, warm: bool = False) -> float:
    """One after the other; `warm`: again and again, from L2 where all of it stays there."""
    stays = warm and total_bytes(kernels) <= machine.l2
    bandwidth = machine.l2_speed if stays else machine.copy
    return sum(kernel.seconds(machine, bandwidth) for kernel in kernels)


def total_bytes(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.bytes for kernel in kernels)


def total_launches(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.launches for kernel in kernels)


# -- torch's fused optimizers ----------------------------------------------------------------------

# Kernels over lists of tensors take so many blocks of so many elements, and so many tensors at a
# time: of four lists (AdamW), of three (SGD with momentum). From torch's MultiTensorApply.cuh.
_BLOCKS, _BLOCK = 320, 65536
_MOST_TENSORS = {True: 36, False: 48}


def optimizer_launches(sizes: Sequence[int], adamw: bool) -> int:
    """For parameters of these sizes; one more counts AdamW's steps."""
    blocks = sum(math.ceil(size / _BLOCK) for size in sizes)
    launches = max(math.ceil(blocks / _BLOCKS), math.ceil(len(sizes) / _MOST_TENSORS[adamw]))
    return launches + adamw


def optimizer_bytes(size: int, stored: int, adamw: bool) -> int:
    """Reads W, G and the state (one tensor, or two of AdamW), writes W and the state."""
    return size * stored * (7 if adamw else 5)
