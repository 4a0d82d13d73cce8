"""Compare several runs in one table and one plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import RunConfig
from .display import percent
from .errors import UsageError
from .files import CONFIG, METRICS, SUMMARY, TWINS, Record, read_config, read_metrics, read_summary
from .tasks import Task


class Run(NamedTuple):
    """Hold the contents of a run directory; `seconds` is None if the run is not finished."""

    directory: Path
    config: RunConfig
    history: Sequence[Record]
    seconds: float | None

    @property
    def recipe(self) -> RunConfig:
        """Return the configuration with seed 0: runs with equal recipes can be averaged."""
        return dataclasses.replace(self.config, seed=0)


def read_runs(directories: Iterable[Path]) -> list[Run]:
    """Read run directories; a comparison counts as its two runs.

    Raises UsageError for a directory without a finished epoch.
    """
    runs = []
    for directory in directories:
        twins = [directory / name for name in TWINS if (directory / name / CONFIG).is_file()]
        for path in twins or [directory]:
            if not (path / METRICS).is_file():
                problem = "holds no finished epoch" if path.is_dir() else "is not a folder"
                raise UsageError(
                    f"DIR {str(path)!r} {problem}. Accepted: folders written by dst-kernels train."
                )
            config = read_config(path)
            history = read_metrics(path, config.task)
            if not history:
                raise UsageError(f"DIR {str(path)!r} holds no finished epoch.")
            seconds = None
            if (path / SUMMARY).exists():
                summary = read_summary(path)
                if summary["epochs"] == len(history):
                    seconds = summary["seconds"]
            runs.append(Run(path, config, history, seconds))
    return runs


def report(directories: Sequence[Path], plot: Path, console: Console) -> list[Run]:
    """Print the table, draw the plot and return the runs; raises what `read_runs` does."""
    from . import plots

    if plot.suffix.lower() != ".png":
        raise UsageError(f"--plot is {str(plot)!r}. Accepted: a name that ends in .png.")
    runs = read_runs(directories)
    task = runs[0].config.task
    odd = [run.directory for run in runs if run.config.task is not task]
    if odd:
        raise UsageError(
            f"DIR {str(odd[0])!r} is measured in another quantity than {str(runs[0].directory)!r}, "
            f"in {task.quality}. Accepted: runs on images, or runs on text."
        )
    console.print(_table(runs, task))
    curves = [plots.Curve(str(run.directory), run.history, run.config.dense) for run in runs]
    replaced = plot.exists()
    title = f"{len(runs)} runs" if len(runs) > 1 else str(runs[0].directory)
    plots.plot_runs(plot, curves, title, task)
    console.print(
        f"plot {'replaced' if replaced else 'written'}: {escape(str(plot))}",
        highlight=False,
        soft_wrap=True,
    )
    return runs


def _table(runs: Sequence[Run], task: Task) -> Table:
    # A model and data set that all runs share go above the table: terminals are narrow.
    subjects = {f"{run.config.model} on {run.config.dataset}" for run in runs}
    shared = len(subjects) == 1
    table = Table(
        title=min(subjects) if shared else None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    table.add_column("run", overflow="fold")
    if not shared:
        table.add_column("model on data", overflow="fold")
    compared = any(run.config.rival is not None for run in runs)
    by = "method" if compared else "alpha"
    for name in (by, "seed", "epochs", task.quality, "remaining", "loss", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, config: RunConfig, *cells: str, style: str | None = None) -> None:
        subject = [] if shared else [f"{config.model} on {config.dataset}"]
        kind = config.kind if compared else config.kind.removeprefix("alpha ")
        table.add_row(name, *subject, kind, *cells, style=style)

    for run in runs:
        last, done, epochs = run.history[-1], len(run.history), run.config.epochs
        add(
            escape(str(run.directory)),
            run.config,
            str(run.config.seed),
            str(done) if done == epochs else f"[yellow]{done} of {epochs}[/]",
            task.show(last[task.key]),
            percent(last["remaining_ratio"]),
            f"{last['test_loss']:.4f}",
            "" if run.seconds is None else f"{run.seconds:.1f}",
        )
    for recipe, finals in _over_seeds(runs).items():
        qualities = [record[task.key] for record in finals]
        ratios = [record["remaining_ratio"] for record in finals]
        loss = mean(record["test_loss"] for record in finals)
        table.add_section()
        name = f"mean of {len(finals)} seeds"
        row = (task.show(mean(qualities)), percent(mean(ratios)), f"{loss:.4f}", "")
        add(name, recipe, "", str(recipe.epochs), *row, style="bold")
        row = (f"± {task.show(stdev(qualities))}", f"± {percent(stdev(ratios))}", "", "")
        add("standard deviation", recipe, "", "", *row, style="dim")
    return table


def _over_seeds(runs: Sequence[Run]) -> dict[RunConfig, list[Record]]:
    """Return, by recipe, the last epochs of finished runs that differ only in the seed."""
    groups: dict[RunConfig, dict[int, Record]] = {}
    for run in runs:
        if len(run.history) == run.config.epochs:
            groups.setdefault(run.recipe, {})[run.config.seed] = run.history[-1]
    return {recipe: list(finals.values()) for recipe, finals in groups.items() if len(finals) > 1}
