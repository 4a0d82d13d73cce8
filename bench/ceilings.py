"""What the machine can do at best, measured in the same run: the yardstick of the goals."""

from __future__ import annotations

import torch

from .results import Run
from .timing import device_time

__all__ = ["CEILING", "COPY", "GEMM", "measure_ceilings"]

CEILING = "ceiling"  # the provider's name in results
COPY, GEMM = "copy", "gemm"  # the cases' names

# CUDA: far beyond L2, and a product large enough to be bound by arithmetic alone.
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**24}
_SIDE = {"cuda": 8192, "cpu": 256}
_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def measure_ceilings(run: Run, suite: str, device: torch.device) -> None:
    """Bandwidth of a copy (bytes read and written) and FLOP/s of a matrix product, random data."""
    size = _COPIED_BYTES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = device_time(lambda: target.copy_(source), device)
    run.add(suite, COPY, CEILING, "forward", "time", copy.median, "s")
    run.add(suite, COPY, CEILING, "forward", "spread", copy.spread, "s")
    run.add(suite, COPY, CEILING, "forward", "bandwidth", 2 * size / copy.median, "B/s")

    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=_DTYPE[device.type]) for _ in "ab")
    product = device_time(lambda: left @ right, device)
    run.add(suite, GEMM, CEILING, "forward", "time", product.median, "s")
    run.add(suite, GEMM, CEILING, "forward", "spread", product.spread, "s")
    run.add(suite, GEMM, CEILING, "forward", "flops", 2 * side**3 / product.median, "FLOP/s")
