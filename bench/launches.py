"""How many kernels, copies and fills a call starts on the GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["count_launches", "launches_in"]

_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def count_launches(call: Callable[[], object], device: torch.device) -> int:
    """CUDA only. Raises RuntimeError where the profiler sees nothing, as without permission."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        count = launches_in(json.loads(path.read_text(encoding="utf-8")))
    if count == 0:
        raise RuntimeError("the profiler saw no kernels")
    return count


def launches_in(trace: dict) -> int:
    """Of a trace as torch.profiler writes it: device events, no ranges and no calls of the host."""
    return sum(event.get("cat") in _KINDS for event in trace["traceEvents"])
