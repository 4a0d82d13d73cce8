"""The table of our kernels beside the least time that the machine allows them."""

from __future__ import annotations

from .floors import ranking
from .measurements import Measurements
from .tables import Section, duration, markdown_table, ratio_text

__all__ = ["kernel_tables"]

_MOST = 15
_NOTE = (
    "Floor: the longer of a pass's products at the speed of the matrix product above and its least "
    "bytes at the copy's bandwidth. Times are those of CUDA graphs where captured, whose warm L2 "
    "can be faster than a copy. Products in float32 and TF32, depthwise convolutions and floors "
    "below 2 µs are left out."
)


def kernel_tables(measurements: Measurements) -> list[Section]:
    """(title, table) with the worst; nothing without a ceiling to hold kernels against."""
    lines = [
        [
            f"`{distance.case.name}`",
            f"{distance.provider}, {distance.pass_name}",
            duration(distance.seconds),
            duration(distance.floor),
            ratio_text(distance.ratio),
            distance.bound,
        ]
        for distance in ranking(measurements)[:_MOST]
    ]
    if not lines:
        return []
    head = ["case", "provider, pass", "time", "floor", "time ÷ floor", "floor set by"]
    table = markdown_table(head, lines)
    return [("Our kernels, furthest from their ceiling first", f"{_NOTE}\n\n{table}")]
