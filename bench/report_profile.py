"""What ncu counted of one kernel, and what bounds it, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .bounds import judged, share_of_time, verdict
from .floors import Distance
from .ncu import DRAM, L2, OCCUPANCY, REGISTERS, SHARED_MEMORY, SM, TENSOR, WAVES, Launch
from .tables import duration, markdown_table, ratio_text

__all__ = ["profile_section"]

_STALLS_SHOWN = 3
_PERCENT = {
    "SM throughput": SM,
    "tensor pipe": TENSOR,
    "DRAM": DRAM,
    "L2": L2,
    "achieved occupancy": OCCUPANCY,
}


def profile_section(distance: Distance | None, launches: Sequence[Launch]) -> str:
    """The kernel to judge among a call's, in a table and one sentence."""
    launch = judged(launches)
    share = share_of_time(launch, launches)
    lines = [["kernel", f"`{launch.name}`"]]
    if distance is not None:
        lines += [
            ["measured", duration(distance.seconds)],
            ["floor", f"{duration(distance.floor)}, set by {distance.bound}"],
            ["measured ÷ floor", ratio_text(distance.ratio)],
        ]
    lines += [
        ["duration in ncu", "-" if launch.seconds is None else duration(launch.seconds)],
        ["of the kernels of the call", "-" if share is None else f"{share:.0%} of {len(launches)}"],
        *([name, _number(launch, metric, " %")] for name, metric in _PERCENT.items()),
        ["waves", _number(launch, WAVES)],
        ["registers a thread", _number(launch, REGISTERS)],
        ["shared memory a block", _shared_memory(launch)],
        ["stalls", _stalls(launch)],
    ]
    table = markdown_table(["", "figure"], lines)
    mostly = "" if share is None or share >= 0.5 else "Other kernels take most of the call's time. "
    return f"{table}\n\n{mostly}{verdict(launch)}"


def _number(launch: Launch, metric: str, unit: str = "") -> str:
    value = launch.figures.get(metric)
    return "-" if value is None else f"{value:.3g}{unit}"


def _shared_memory(launch: Launch) -> str:
    sizes = [launch.figures.get(metric) for metric in SHARED_MEMORY]
    return "-" if None in sizes else f"{sum(sizes) / 1024:.3g} KiB"


def _stalls(launch: Launch) -> str:
    return ", ".join(f"{name} {part:.0%}" for name, part in launch.stalls[:_STALLS_SHOWN]) or "-"
