"""How far each kernel of ours is from the least time that the machine's ceilings allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cases import CONV, LINEAR, MASKED_WEIGHT, WEIGHT_LIST, AnyCase, ConvCase, ListCase
from .ceilings import CEILING, COPY, GEMM
from .environment import CPU
from .list_providers import LIST_PASSES
from .measurements import Measurements
from .work import flops, least_bytes, list_bytes

__all__ = ["ARITHMETIC", "MEMORY", "Distance", "distance_of", "distinct_first", "ranking"]

ARITHMETIC, MEMORY = "arithmetic", "memory"

# The passes that are one kernel of ours, but for small ones beside it that decide a guard or add
# up shares: (provider, passes) by op. Elsewhere the vendor's products take most of the time.
_FUSED = ("fused", ("forward", "grad_input", "grad_weight"))
_OURS = {
    LINEAR: _FUSED,
    CONV: _FUSED,
    MASKED_WEIGHT: ("auto", ("forward", "backward")),
    WEIGHT_LIST: ("auto", LIST_PASSES),
}
_AS_FAST_AS_THE_CEILING = (torch.bfloat16, torch.float16)  # on tensor cores; the ceiling's is bf16
_SHORTEST = 2e-6  # a floor below this is lost in what it takes to launch a kernel


@dataclass(frozen=True)
class Distance:
    """A measured pass, and the least time that it could take.

    Args:
        seconds: measured. floor: the least.
        bound: which ceiling makes the floor, ARITHMETIC or MEMORY.
    """

    case: AnyCase
    provider: str
    pass_name: str
    seconds: float
    floor: float
    bound: str

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor

    @property
    def kernel(self) -> tuple[str, str]:
        """The same for all sizes of one kernel."""
        return self.case.op, self.pass_name


def ranking(found: Measurements) -> list[Distance]:
    """The kernels of ours that were measured on a GPU, furthest from their ceiling first.

    Left out: floors that launching hides, and depthwise convolutions, whose tiles are nearly empty
    by design (they are the packed path's).
    """
    if found.gpu == CPU:
        return []
    distances = []
    for case in found.cases.values():
        provider, passes = _OURS.get(case.op, ("", ()))
        if isinstance(case, ConvCase) and case.groups == case.C > 1:
            continue
        for name in passes:
            distance = distance_of(found, case, provider, name)
            if distance is not None and distance.floor >= _SHORTEST:
                distances.append(distance)
    return sorted(distances, key=lambda distance: -distance.ratio)


def distinct_first(distances: Sequence[Distance]) -> list[Distance]:
    """In their order, but each kernel once before any a second time."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for distance in distances:
        turns.append(seen[distance.kernel])
        seen[distance.kernel] += 1
    return [distances[i] for i in sorted(range(len(turns)), key=turns.__getitem__)]


def distance_of(
    found: Measurements, case: AnyCase, provider: str, pass_name: str
) -> Distance | None:
    """In the newest run that has the time and the ceilings; None without one, or without a floor.

    The floor is the longer of the pass's FLOPs at the speed of the ceiling's bf16 product and of
    its least bytes at the bandwidth of a copy. Products in float32 and TF32 have none: no ceiling
    of theirs is measured. The time is that under a CUDA graph where there is one, without gaps
    between launches; its L2 is warm, so what fits there can be faster than its floor.
    """
    work, size = _work(case, pass_name)
    if size is None or (work is not None and case.mode.compute not in _AS_FAST_AS_THE_CEILING):
        return None
    times = found.figures(case.name, provider, pass_name, "time")
    bandwidths = found.figures(COPY, CEILING, "forward", "bandwidth")
    speeds = found.figures(GEMM, CEILING, "forward", "flops")
    runs = times.keys() & bandwidths.keys()
    if work is not None:
        runs &= speeds.keys()
    if not runs:
        return None
    run = max(runs)
    moving = size / bandwidths[run]
    computing = 0.0 if work is None else work / speeds[run]
    return Distance(
        case,
        provider,
        pass_name,
        found.figures(case.name, provider, pass_name, "graph_time").get(run, times[run]),
        max(moving, computing),
        ARITHMETIC if computing > moving else MEMORY,
    )


def _work(case: AnyCase, pass_name: str) -> tuple[int | None, int | None]:
    """FLOPs of its products, and least bytes; None for what is not there or cannot be counted."""
    if case.op not in _OURS:
        return None, None
    if isinstance(case, ListCase):
        return None, list_bytes(case, pass_name)
    return flops(case, pass_name), least_bytes(case, pass_name)
