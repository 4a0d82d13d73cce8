"""Reading figures back: the newest of each, and ratios between figures of one run."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from .cases import Case, case_named
from .results import CPU, ERROR, SKIPPED, Row, UsageError

CEILING = "ceiling"  # the contender that stands for what the machine can do at best
COPY, GEMM = "copy", "gemm"  # its cases
CHOSEN = "chosen"  # the contender that stands for the tile that the library takes

Figures = dict[str, float]  # of each run, by its date
_Names = str | Sequence[str]
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """Return a time in three digits of the unit that suits."""
    size, unit = next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def by_device(rows: Iterable[Row]) -> dict[str, Measurements]:
    """Return the rows of each device apart: figures of two devices are never compared."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.gpu].append(row)
    return {gpu: Measurements(gpu, group) for gpu, group in groups.items()}


def only_gpu(rows: Iterable[Row], name: str | None = None) -> Measurements:
    """Return what is of the GPU whose name contains `name`; UsageError if none or several do."""
    found = [one for one in by_device(rows).values() if not one.on_cpu]
    fitting = [one for one in found if name is None or name.lower() in one.gpu.lower()]
    if len(fitting) != 1:
        names = ", ".join(one.gpu for one in found) or "no GPU: all rows are of a CPU"
        raise UsageError(f"--gpu is {name!r}. Accepted: part of the name of one of {names}.")
    return fitting[0]


class Measurements:
    """The figures of one device (for a processor `gpu` is "cpu: " and its name).

    `cases` are by name; `reasons`: (case, contender, pass, reason) of what has no figure. A figure
    is left out where its contender was found wrong on the case later or in the same run.
    """

    def __init__(self, gpu: str, rows: Sequence[Row]) -> None:
        self.gpu, self.rows = gpu, list(rows)
        self.cases: dict[str, Case] = {}
        self.reasons: list[tuple[str, str, str, str]] = []
        self._figures: dict[tuple[str, str, str, str], Figures] = {}
        wrong: dict[tuple[str, str], str] = defaultdict(str)  # the last date
        for row in self.rows:
            if row.metric == ERROR:
                key = row.case, row.provider
                wrong[key] = max(row.date, wrong[key])
        for row in self.rows:
            if row.provider != CEILING and row.case not in self.cases:
                self.cases[row.case] = case_named(row.case)
            if row.metric in (ERROR, SKIPPED):
                self.reasons.append((row.case, row.provider, row.pass_, row.value))
            elif row.date > wrong[row.case, row.provider]:
                key = (row.case, row.provider, row.pass_, row.metric)
                self._figures.setdefault(key, {})[row.date] = row.figure

    @property
    def on_cpu(self) -> bool:
        """Whether they are of a processor rather than a GPU."""
        return self.gpu.startswith(CPU)

    def figures(self, case: str, contender: _Names, pass_name: str, metric: _Names) -> Figures:
        """Return a figure of every run, by its date; of several names the least."""
        least: Figures = {}
        for name, one in itertools.product(_several(contender), _several(metric)):
            for date, value in self._figures.get((case, name, pass_name, one), {}).items():
                least[date] = min(value, least.get(date, value))
        return least

    def newest(self, case: str, contender: str, pass_name: str, metric: _Names) -> float | None:
        """Return a figure of the newest run that has it, of several metrics the least."""
        figures = self.figures(case, contender, pass_name, metric)
        return figures[max(figures)] if figures else None

    def ratio(
        self, case: str, pass_name: str, metric: _Names, ours: _Names, others: _Names
    ) -> float | None:
        """Return `ours` over `others`, of several names the least, in the newest run with both."""
        sides = ((case, side, pass_name, metric) for side in (ours, others))
        return self._compared(operator.truediv, *sides)

    def difference(
        self, case: str, pass_name: str, metric: str, ours: str, other: str
    ) -> float | None:
        """Return `ours` less `other` in the newest run with both."""
        sides = ((case, side, pass_name, metric) for side in (ours, other))
        return self._compared(operator.sub, *sides)

    def share_of_copy(self, case: str, contender: str, pass_name: str) -> float | None:
        """Return its bandwidth over that of a copy in the newest run with both."""
        mine = (case, contender, pass_name, "bandwidth")
        return self._compared(operator.truediv, mine, (COPY, CEILING, "forward", "bandwidth"))

    def _compared(self, operation: Callable, *sides: tuple) -> float | None:
        mine, theirs = (self.figures(*side) for side in sides)
        runs = mine.keys() & theirs.keys()
        return operation(mine[max(runs)], theirs[max(runs)]) if runs else None

    def time_ratio(self, case: str, pass_name: str, ours: _Names, others: _Names) -> float | None:
        """Return `ratio` of `graph_time` where the newest run has it of all, else of `time`.

        Short work is timed under a CUDA graph, where launches cost nobody anything; everybody
        who has a time must then have one there, or the best of them might be missed.
        """

        def reached(names: _Names, metric: str = "time") -> Figures:
            return self.figures(case, names, pass_name, metric)

        mine, theirs = reached(ours), reached(others)
        run = max(mine.keys() & theirs.keys(), default=None)
        timed = [name for name in (*_several(ours), *_several(others)) if run in reached(name)]
        if timed and all(run in reached(name, "graph_time") for name in timed):
            mine, theirs = reached(ours, "graph_time"), reached(others, "graph_time")
        return mine[run] / theirs[run] if timed else None

    def fastest(self, case: str, pass_name: str, contenders: Sequence[str]) -> str | None:
        """Return the name of the contender with the least time in its newest run."""
        times = {name: self.newest(case, name, pass_name, "time") for name in contenders}
        return min(filter(times.get, times), key=times.get, default=None)


def _several(names: _Names) -> Sequence[str]:
    return [names] if isinstance(names, str) else names
