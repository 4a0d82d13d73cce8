"""What is to be reached on a GPU, as data: each goal knows its limit and how to find its figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import MASKED_WEIGHT, SUITES, Case
from .ceilings import COPY
from .measurements import COMPILED_DST, Measurements, geometric_mean
from .work import bytes_of

__all__ = ["GOALS", "MET", "MISSED", "NOT_MEASURED", "Figure", "Goal"]

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
    """

    title: str
    limit: float
    cases: tuple[Case, ...]
    of_case: Callable[[Measurements, Case], float | None]
    at_least: bool = False
    mean: bool = False

    def figure(self, measurements: Measurements | None) -> Figure:
        """`measurements` of one GPU; None where there are none."""
        found: dict[str, float] = {}
        for case in self.cases:
            value = None if measurements is None else self.of_case(measurements, case)
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


# -- figures of one case -----------------------------------------------------------------------


def _time(pass_name: str, ours: str, others: str | Sequence[str]):
    return lambda found, case: found.time_ratio(case.name, pass_name, ours, others)


def _speed(pass_name: str, ours: str, other: str):
    """How much of the other's speed is reached."""
    return lambda found, case: found.time_ratio(case.name, pass_name, other, ours)


def _ratio(pass_name: str, metric: str, ours: str, other: str):
    return lambda found, case: found.ratio(case.name, pass_name, metric, ours, other)


def _bandwidth(pass_name: str):
    return lambda found, case: found.share_of_ceiling(
        case.name, "auto", pass_name, "bandwidth", COPY
    )


def _saved_over_allowed(found: Measurements, case: Case) -> float | None:
    """Beside input, weight and threshold: one masked copy and the effective threshold."""
    saved = found.newest(case.name, "auto", "forward", "saved")
    allowed = case.N * case.K * bytes_of(case.mode.compute) + case.N * 4
    return None if saved is None else saved / allowed


# -- the goals ---------------------------------------------------------------------------------

_ALL = tuple(case for case in SUITES["linear"].cases if case.dtype == "bf16-autocast")
_UP_TO_8K = tuple(case for case in _ALL if case.M <= 8192)
_AT_8K = tuple(case for case in _ALL if case.M == 8192)
_UP_TO_1K = tuple(case for case in _ALL if case.M <= 1024)  # where the host may be what decides
_TF32 = tuple(case for case in SUITES["linear"].cases if case.dtype == "tf32")
_BF16 = tuple(case for case in SUITES["linear"].cases if case.dtype == "bf16")
_FROM_16M = tuple(
    case
    for case in SUITES["streaming"].cases
    if case.op == MASKED_WEIGHT and case.N * case.K >= 2**24
)

_BOTH = "forward_backward"
_TO_DENSE = _time(_BOTH, "auto", "dense")
_TO_COMPILED = _time(_BOTH, "auto", COMPILED_DST)
_TO_EAGER = _time(_BOTH, "auto", "dst_eager")

GOALS = (
    Goal("forward+backward ÷ dense, mean", 1.00, _ALL, _TO_DENSE, mean=True),
    Goal("forward+backward ÷ dense, worst", 1.08, _ALL, _TO_DENSE),
    Goal("forward+backward ÷ best compiled DST, mean", 0.93, _ALL, _TO_COMPILED, mean=True),
    Goal("forward+backward ÷ best compiled DST, worst", 1.02, _ALL, _TO_COMPILED),
    Goal("forward+backward ÷ eager DST up to 8k tokens, worst", 0.50, _UP_TO_8K, _TO_EAGER),
    Goal("pack from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, _bandwidth("forward"), True),
    Goal(
        "post from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, _bandwidth("backward"), True
    ),
    Goal(
        "fused dW at 8k tokens, of cuBLAS",
        0.90,
        _AT_8K,
        _speed("grad_weight", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused forward in tf32, of cuBLAS",
        0.85,
        _TF32,
        _speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused forward with bf16 parameters, of cuBLAS",
        0.85,
        _BF16,
        _speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "peak memory of forward+backward ÷ dense, worst",
        1.00,
        _ALL,
        _ratio(_BOTH, "memory", "auto", "dense"),
    ),
    Goal("saved for backward ÷ one masked copy, worst", 1.00, _ALL, _saved_over_allowed),
    Goal(
        "host cost of forward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        _ratio("forward", "host_time", "auto", "dense"),
    ),
    Goal(
        "host cost of forward+backward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        _ratio(_BOTH, "host_time", "auto", "dense"),
    ),
)
