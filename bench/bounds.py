"""What bounds a kernel, by rules over what ncu counted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .ncu import DRAM, L2, SM, TENSOR, WAVES, Launch

__all__ = ["OURS", "judged", "share_of_time", "verdict"]

OURS = (
    "add_pieces_kernel",
    "conv_grad_weight_kernel",
    "conv_product_kernel",
    "conv_slabs_kernel",
    "finish_kernel",
    "grad_weight_kernel",
    "guard_kernel",
    "norm_kernel",
    "pack_kernel",
    "post_kernel",
    "product_kernel",
    "regularization_kernel",
    "settle_kernel",
    "slabs_kernel",
    "step_kernel",
    "total_kernel",
)
"""Kernels in Triton and CUDA, as they are called in the sources."""

_OUR_NAME = re.compile(rf"\b({'|'.join(OURS)})\b")

_NEAR_PEAK = 80.0  # percent, as in Nsight Compute's own rules
_SMALL_GRID = 0.5  # of what runs at once: with room for two blocks, a multiprocessor has one
_RESOURCES = (
    (DRAM, "memory bandwidth: DRAM"),
    (TENSOR, "arithmetic: the tensor pipe"),
    (L2, "the bandwidth of L2: it"),
    (SM, "instructions other than the tensor cores' own: the busiest part of a multiprocessor"),
)
_STALLS = {
    "barrier": "other warps at a barrier",
    "drain": "stores at its end",
    "gmma": "wgmma instructions, a warpgroup's arrival or end",
    "imc_miss": "constants",
    "lg_throttle": "a full queue of loads and stores",
    "long_scoreboard": "loads from global memory",
    "math_pipe_throttle": "a busy arithmetic pipe",
    "membar": "a memory fence",
    "mio_throttle": "a full queue to shared memory",
    "no_instruction": "instructions to be fetched",
    "short_scoreboard": "shared memory",
    "wait": "results of arithmetic, a fixed number of cycles",
}


def judged(launches: Sequence[Launch]) -> Launch:
    """The longest of ours, or of all where none is ours."""
    ours = [launch for launch in launches if _OUR_NAME.search(launch.name)]
    return max(ours or launches, key=lambda launch: launch.seconds or 0.0)


def share_of_time(launch: Launch, launches: Sequence[Launch]) -> float | None:
    """Of all kernels of the call; None where one has no time."""
    times = [one.seconds for one in launches]
    if launch.seconds is None or None in times or not sum(times):
        return None
    return launch.seconds / sum(times)


def verdict(launch: Launch) -> str:
    """One sentence: the first resource near its peak, too small a grid, or the longest wait."""
    for metric, resource in _RESOURCES:
        if launch.figures.get(metric, 0.0) >= _NEAR_PEAK:
            return f"Bound by {resource} runs at {launch.figures[metric]:.0f} % of its peak."
    waves = launch.figures.get(WAVES)
    if waves is not None and waves < _SMALL_GRID:
        return f"Bound by its small grid: {waves:.0%} of the blocks that the GPU has room for."
    if launch.stalls:
        reason, share = launch.stalls[0]
        what = _STALLS.get(reason, "what ncu calls by that name")
        return (
            f"Bound by latency: nothing is near its peak, and {share:.0%} of a warp's time goes "
            f"into waiting for {what} ({reason})."
        )
    return "Not known: ncu counted neither a resource near its peak nor reasons for stalls."
