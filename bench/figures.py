"""Figures that goals are about: functions of the measurements and a case, None without a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cases import AnyCase
from .ceilings import COPY
from .measurements import Measurements

__all__ = ["FigureOf", "bandwidth", "best_ratio", "difference", "ratio", "speed", "time_ratio"]

FigureOf = Callable[[Measurements, AnyCase], "float | None"]


def time_ratio(pass_name: str, ours: str, others: str | Sequence[str]) -> FigureOf:
    """Of times under a CUDA graph where both sides have them, else as enqueued."""
    return lambda found, case: found.time_ratio(case.name, pass_name, ours, others)


def speed(pass_name: str, ours: str, other: str) -> FigureOf:
    """How much of the other's speed is reached."""
    return time_ratio(pass_name, other, ours)


def ratio(pass_name: str, metric: str, ours: str, other: str) -> FigureOf:
    return lambda found, case: found.ratio(case.name, pass_name, metric, ours, other)


def best_ratio(pass_name: str, ours: Sequence[str], others: Sequence[str]) -> FigureOf:
    """Of the least times, whoever has them and whether eagerly or under a CUDA graph."""
    return lambda found, case: found.best_ratio(case.name, pass_name, ours, others)


def difference(pass_name: str, metric: str, ours: str, other: str) -> FigureOf:
    return lambda found, case: found.difference(case.name, pass_name, metric, ours, other)


def bandwidth(pass_name: str) -> FigureOf:
    """Of ours, as a share of a copy's."""
    return lambda found, case: found.share_of_ceiling(
        case.name, "auto", pass_name, "bandwidth", COPY
    )
