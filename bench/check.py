"""Prints each goal with its figure."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .environment import CPU, is_predicted
from .errors import UsageError
from .goal import MET, MISSED, NOT_MEASURED, Figure
from .goals import GOALS
from .measurements import Measurements, by_gpu
from .results import Row

__all__ = ["check_goals", "choose_devices", "choose_gpu", "choose_predicted"]

_STYLES = {MET: "green", MISSED: "bold red", NOT_MEASURED: "yellow"}
_MOST_NAMED = 3


def choose_gpu(rows: list[Row], name: str | None) -> Measurements | None:
    """The measurements of the one GPU (whose name contains `name`); None with rows of CPUs only.

    Raises UsageError where several GPUs, or none, fit.
    """
    found = {gpu: one for gpu, one in by_gpu(rows).items() if gpu != CPU}
    fitting = [one for gpu, one in found.items() if name is None or name.lower() in gpu.lower()]
    if len(fitting) > 1 or (name is not None and not fitting):
        raise UsageError(
            f"--gpu is {name!r}. Accepted: part of the name of one of "
            f"{', '.join(found) or 'no GPU: all rows are of a CPU'}."
        )
    return fitting[0] if fitting else None


def choose_devices(rows: list[Row], name: str | None) -> list[Measurements]:
    """Whose goals can be judged: the GPU's as in `choose_gpu`, and without a `name` a CPU's."""
    gpu, cpu = choose_gpu(rows, name), by_gpu(rows).get(CPU)
    return [one for one in (gpu, cpu if name is None else None) if one is not None]


def choose_predicted(rows: list[Row]) -> Measurements:
    """The predictions of one GPU. Raises UsageError for anything else."""
    found = by_gpu(rows)
    if len(found) != 1 or not is_predicted(next(iter(found))):
        raise UsageError(
            f"--predicted has rows of {', '.join(found)}. Accepted: those of one GPU, as written "
            "by python -m bench predict."
        )
    return next(iter(found.values()))


def check_goals(
    measurements: Measurements, console: Console, predicted: Measurements | None = None
) -> dict[str, str]:
    """Print the table of the goals for this kind of device; the verdict of each, by title.

    Beside the figures those that were `predicted`, where given.
    """
    beside = f" beside {predicted.gpu}" if predicted else ""
    console.print(f"Goals, {measurements.gpu}{beside}", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("verdict", "figure", *(["predicted"] if predicted else []), "limit", "goal")
    for column in columns:
        number = column in ("figure", "predicted", "limit")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    verdicts = {}
    for goal in (goal for goal in GOALS if goal.is_about(measurements)):
        figure = goal.figure(measurements)
        verdicts[goal.title] = verdict = goal.verdict(figure)
        note = _note(figure)
        table.add_row(
            f"[{_STYLES[verdict]}]{verdict}[/]",
            _text(figure),
            *([_text(goal.figure(predicted))] if predicted else []),
            f"{'≥' if goal.at_least else '≤'} {goal.limit:.2f}",
            escape(goal.title) + (note and f"\n[dim]{escape(note)}[/]"),
        )
    console.print(table)
    return verdicts


def _text(figure: Figure) -> str:
    return "-" if figure.value is None else f"{figure.value:.3f}"


def _note(figure: Figure) -> str:
    parts = [f"at {figure.where}"] if figure.where else []
    if len(figure.missing) == figure.cases:
        return f"none of {figure.cases} cases" if figure.cases > 1 else figure.missing[0]
    if figure.missing:
        named = ", ".join(figure.missing[:_MOST_NAMED])
        others = len(figure.missing) - _MOST_NAMED
        more = f" and {others} more" if others > 0 else ""
        parts.append(f"{len(figure.missing)} of {figure.cases} cases missing: {named}{more}")
    return "; ".join(parts)
