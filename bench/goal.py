"""A goal: a limit, and how to find the figure that is held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import AnyCase
from .environment import CPU
from .measurements import Measurements, geometric_mean

__all__ = ["GPU", "MET", "MISSED", "NOT_MEASURED", "Figure", "Goal"]

GPU = "gpu"

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Figure:
    """What was measured for a goal.

    Args:
        value: over the cases that were measured; None without any.
        where: the case that decides a worst value.
        missing: names of the cases without a figure.
        cases: how many there should be.
    """

    value: float | None
    where: str
    missing: tuple[str, ...]
    cases: int


@dataclass(frozen=True)
class Goal:
    """A limit on one figure over several cases.

    Args:
        title: what the figure is.
        limit: what it may be at most, or at least where `at_least`.
        cases: all that count.
        of_case: the figure of one of them, None where it was not measured.
        mean: the geometric mean is held against the limit; else the worst case.
        device: GPU or CPU: whose figures it is about.
    """

    title: str
    limit: float
    cases: tuple[AnyCase, ...]
    of_case: Callable[[Measurements, AnyCase], float | None]
    at_least: bool = False
    mean: bool = False
    device: str = GPU

    def is_about(self, measurements: Measurements) -> bool:
        return (measurements.gpu == CPU) == (self.device == CPU)

    def figure(self, measurements: Measurements) -> Figure:
        """Of one device, which the goal should be about."""
        found: dict[str, float] = {}
        for case in self.cases:
            value = self.of_case(measurements, case)
            if value is not None:
                found[case.name] = value
        missing = tuple(case.name for case in self.cases if case.name not in found)
        if not found:
            return Figure(None, "", missing, len(self.cases))
        if self.mean:
            return Figure(geometric_mean(list(found.values())), "", missing, len(self.cases))
        where = (min if self.at_least else max)(found, key=found.get)
        return Figure(found[where], where, missing, len(self.cases))

    def verdict(self, figure: Figure) -> str:
        """One bad case misses a goal on the worst; nothing is met before all cases are measured."""
        if figure.value is None or (self.mean and figure.missing):
            return NOT_MEASURED
        if figure.value < self.limit if self.at_least else figure.value > self.limit:
            return MISSED
        return NOT_MEASURED if figure.missing else MET
