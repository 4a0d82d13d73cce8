"""Numbers as text, and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .measurements import geometric_mean

__all__ = ["Section", "duration", "markdown_table", "mean_text", "ratio_text"]

Section = tuple[str, str]
"""A title and what stands below it."""


def duration(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def mean_text(column: Sequence[float | None]) -> str:
    """The geometric mean of what is there, and of how many where some are missing."""
    values = [value for value in column if value is not None and not math.isnan(value)]
    if not values:
        return "-"
    missing = len(values) < len(column)
    return ratio_text(geometric_mean(values)) + missing * f" ({len(values)} of {len(column)})"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---:"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
