"""Reading figures back: the newest of each, and ratios between figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .cases import AnyCase, case_of
from .ceilings import CEILING
from .environment import CPU, is_predicted
from .results import ERROR, SKIPPED, Row

__all__ = ["COMPILED_DST", "Measurements", "by_gpu", "geometric_mean", "only_gpu"]

COMPILED_DST = ("dst_compiled", "dst_compiled_forced_prologue")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def by_gpu(rows: Iterable[Row]) -> dict[str, Measurements]:
    """The rows of each device apart: figures of two devices are never compared."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.gpu, []).append(row)
    return {gpu: Measurements(gpu, group) for gpu, group in groups.items()}


def only_gpu(rows: Iterable[Row]) -> list[Row]:
    """Measured on a GPU."""
    return [row for row in rows if row.gpu != CPU and not is_predicted(row.gpu)]


class Measurements:
    """The figures of one device.

    Attributes:
        gpu: the device's name; "cpu" for none.
        cases: by name, in the order of their first rows.
        reasons: (case, provider, pass, reason), newest last, for what has no figure.
        rows: all.

    A figure is left out where its provider was found wrong on the case later or in the same run.
    """

    def __init__(self, gpu: str, rows: Sequence[Row]) -> None:
        self.gpu, self.rows = gpu, list(rows)
        self.cases: dict[str, AnyCase] = {}
        self.reasons: list[tuple[str, str, str, str]] = []
        self._figures: dict[tuple[str, str, str, str], dict[str, float]] = {}
        wrong = {}
        for row in self.rows:
            if row.metric == ERROR:
                wrong[row.case, row.provider] = max(
                    row.date, wrong.get((row.case, row.provider), "")
                )
        for row in self.rows:
            if row.provider != CEILING and row.case not in self.cases:
                self.cases[row.case] = case_of(
                    row.case, row.M, row.N, row.K, row.dtype, row.remaining_ratio
                )
            if row.metric in (ERROR, SKIPPED):
                self.reasons.append((row.case, row.provider, row.pass_, row.value))
            elif row.date > wrong.get((row.case, row.provider), ""):
                key = (row.case, row.provider, row.pass_, row.metric)
                self._figures.setdefault(key, {})[row.date] = row.figure

    def figures(self, case: str, provider: str, pass_name: str, metric: str) -> dict[str, float]:
        """By the date of the run."""
        return self._figures.get((case, provider, pass_name, metric), {})

    def newest(self, case: str, provider: str, pass_name: str, metric: str) -> float | None:
        figures = self.figures(case, provider, pass_name, metric)
        return figures[max(figures)] if figures else None

    def ratio(
        self, case: str, pass_name: str, metric: str, ours: str, others: str | Sequence[str]
    ) -> float | None:
        """`ours` over the least of `others` in the newest run that has both; None without one."""
        mine = self.figures(case, ours, pass_name, metric)
        theirs = self._least(case, pass_name, metric, others)
        both = mine.keys() & theirs.keys()
        return mine[max(both)] / theirs[max(both)] if both else None

    def best_ratio(
        self, case: str, pass_name: str, ours: Sequence[str], others: Sequence[str]
    ) -> float | None:
        """The least of `time` and `graph_time` of any of `ours` over that of `others`, in the
        newest run that has both; None without one.
        """
        mine, theirs = (self._fastest(case, pass_name, names) for names in (ours, others))
        both = mine.keys() & theirs.keys()
        return mine[max(both)] / theirs[max(both)] if both else None

    def difference(
        self, case: str, pass_name: str, metric: str, ours: str, other: str
    ) -> float | None:
        """`ours` less `other` in the newest run that has both; None without one."""
        mine, theirs = (self.figures(case, name, pass_name, metric) for name in (ours, other))
        both = mine.keys() & theirs.keys()
        return mine[max(both)] - theirs[max(both)] if both else None

    def time_ratio(
        self, case: str, pass_name: str, ours: str, others: str | Sequence[str]
    ) -> float | None:
        """As `ratio`: of `graph_time` where the newest run has it of both sides, else of `time`.

        Short work is timed under a CUDA graph, where launches cost nobody anything; each of
        `others` that has a time must then have one there, or the best of them might be missed.
        """
        names = [others] if isinstance(others, str) else others
        run = max(
            self.figures(case, ours, pass_name, "time").keys()
            & self._least(case, pass_name, "time", names).keys(),
            default=None,
        )
        if run is None:
            return None
        sides = (ours, *(n for n in names if run in self.figures(case, n, pass_name, "time")))
        under_graph = all(run in self.figures(case, n, pass_name, "graph_time") for n in sides)
        metric = "graph_time" if under_graph else "time"
        return (
            self.figures(case, ours, pass_name, metric)[run]
            / self._least(case, pass_name, metric, names)[run]
        )

    def share_of_ceiling(
        self, case: str, provider: str, pass_name: str, metric: str, ceiling: str
    ) -> float | None:
        """Bandwidth or flops over those of the ceiling's case in the same run, the newest."""
        reached = self.figures(case, provider, pass_name, metric)
        possible = self.figures(ceiling, CEILING, "forward", metric)
        both = reached.keys() & possible.keys()
        return reached[max(both)] / possible[max(both)] if both else None

    def _least(
        self, case: str, pass_name: str, metric: str, providers: str | Sequence[str]
    ) -> dict[str, float]:
        """By the date of the run, the least figure of any of the providers."""
        names = [providers] if isinstance(providers, str) else providers
        return _least(self.figures(case, name, pass_name, metric) for name in names)

    def _fastest(self, case: str, pass_name: str, providers: Sequence[str]) -> dict[str, float]:
        """The same of both kinds of time."""
        metrics = ("time", "graph_time")
        return _least(self._least(case, pass_name, metric, providers) for metric in metrics)


def _least(several: Iterable[dict[str, float]]) -> dict[str, float]:
    """By the date of the run, the least of several figures."""
    least: dict[str, float] = {}
    for figures in several:
        for date, value in figures.items():
            least[date] = min(value, least.get(date, value))
    return least
