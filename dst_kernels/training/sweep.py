"""Train a recipe for several values of an option and several seeds, side by side."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import plots
from .config import RunConfig, option
from .device import select_device
from .display import percent
from .errors import UsageError
from .files import Record, cannot_write, holds_run, is_finished, read_config, write_atomically
from .journal import duration
from .report import Run, read_runs
from .run import load
from .state import new_state
from .tasks import Task

CSV, PLOT, PLOT_OF_LAYERS = "sweep.csv", "sweep.png", "layers.png"

Axes = Mapping[str, Sequence[Any]]
"""Values by the name of the option of `train` that takes them. The last are seeds, of the means."""


class SweepError(UsageError):
    """Report runs of a sweep that failed."""

    exit_code = 1


@dataclasses.dataclass
class _Job:
    directory: Path
    command: list[str]

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it ends with the job)
        self.started = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=self.errors)

    def last_error(self) -> str:
        """Return the last line that the process wrote to its standard error."""
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def sweep(
    configure: Callable[..., RunConfig],
    axes: Axes,
    given: Sequence[str],
    out: Path,
    jobs: int,
    console: Console,
    download: bool = False,
) -> list[Run]:
    """Train all combinations of the axes' values, `jobs` at a time; write and show what came out.

    `configure` returns the configuration with a run's values, `given` are the options of every run,
    as the command line has them. Runs that are in `out` already are kept, and gone on with if they
    were stopped. Return the finished runs. Raises UsageError before the first one starts if the
    options do not fit or a folder has another run; SweepError at the end if runs failed.
    """
    combinations = [
        dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())
    ]
    names = ["-".join(_part(*each) for each in chosen.items()) for chosen in combinations]
    configs = [configure(**chosen) for chosen in combinations]
    # Wrong input ends here, not in every process.
    data, device = load(configs[0], download), select_device(configs[0].device)
    for config in configs:
        if config.rival is not None and config.seed == axes["seed"][0]:
            new_state(config, data, device)
    planned = [
        _job(out / name, config, [*given, *(f"{option(f)}={v}" for f, v in chosen.items())])
        for name, config, chosen in zip(names, configs, combinations, strict=True)
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    waiting = [job for job in planned if job is not None]
    finished = len(planned) - len(waiting)
    console.print(
        f"{len(planned)} runs in {escape(str(out))}"
        + (f", {finished} of them finished" if finished else ""),
        highlight=False,
    )
    failed = _run_all(waiting, jobs, console, len(planned))
    done = [i for i, name in enumerate(names) if is_finished(out / name)]
    runs = read_runs([out / names[i] for i in done]) if done else []
    if runs:
        _show(runs, [combinations[i] for i in done], out, console)
    if failed:
        raise SweepError(
            f"{len(failed)} of {len(planned)} runs failed, the first of them {failed[0]}. The same "
            "command tries them again, and keeps the others."
        )
    return runs


def _job(directory: Path, config: RunConfig, options: Sequence[str]) -> _Job | None:
    """Return what starts a run or goes on with it; None if it is finished."""
    command = [sys.executable, "-m", "dst_kernels", "train"]
    if not holds_run(directory):
        return _Job(directory, [*command, *options, "--out", str(directory)])
    if read_config(directory) != config:
        raise UsageError(
            f"--out {str(directory.parent)!r}: {directory.name} is a run with other options. "
            "Accepted: the options with which the sweep began, or another folder."
        )
    if is_finished(directory):
        return None
    return _Job(directory, [*command, "--resume", str(directory)])


def _run_all(waiting: Sequence[_Job], jobs: int, console: Console, total: int) -> list[str]:
    """Run all jobs; return the names of those that failed, with the last line that they wrote."""
    began, rest, failed = time.perf_counter(), list(waiting), []
    running: list[_Job] = []
    try:
        while rest or running:
            while rest and len(running) < jobs:
                rest[0].start()
                running.append(rest.pop(0))
            time.sleep(0.05)
            for job in [each for each in running if each.process.poll() is not None]:
                running.remove(job)
                now, over = time.perf_counter(), len(waiting) - len(rest) - len(running)
                left = (now - began) / over * (len(waiting) - over)
                if job.process.returncode:
                    failed.append(f"{job.directory.name}: {job.last_error()}")
                    result = f"[bold red]failed:[/] {escape(job.last_error())}"
                else:
                    result = _result(job.directory)
                console.print(
                    f"{total - len(waiting) + over}/{total}  {job.directory.name}  {result}"
                    f"  {duration(now - job.started)}"
                    + (f"  {duration(left)} left" if left else ""),
                    highlight=False,
                    soft_wrap=True,
                )
    except KeyboardInterrupt:
        for job in running:
            job.process.send_signal(signal.SIGINT)
        for job in running:
            job.process.wait()
        finished = total - len(rest) - len(running) - len(failed)
        raise KeyboardInterrupt(
            f"Interrupted: {finished} of {total} runs are finished. To go on, give the same "
            "command."
        ) from None
    return failed


def _result(directory: Path) -> str:
    (run,) = read_runs([directory])
    last, task = run.history[-1], run.config.task
    return f"{task.show(last[task.key])}  remaining {percent(last['remaining_ratio'])}"


def _part(field: str, value: Any) -> str:
    """Return a value's part of a run's name."""
    return value if field == "method" else f"{field}-{value:g}"


def _show(
    runs: Sequence[Run], chosen: Sequence[Mapping[str, Any]], out: Path, console: Console
) -> None:
    """Print means over the seeds, and write them, all runs and the plots into the folder.

    `chosen` are the values of the axes with which each run was trained.
    """
    task = runs[0].config.task
    _write_csv(runs, chosen, out)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run, each in zip(runs, chosen, strict=True):
        groups.setdefault(tuple(each.values())[:-1], []).append(run)  # the last is the seed
    *axes, _ = chosen[0]
    timed = "method" in axes
    table = Table(
        title=f"{runs[0].config.model} on {runs[0].config.dataset}", title_justify="left",
        title_style="bold", box=SIMPLE_HEAD, header_style="dim",
    )  # fmt: skip
    for name in (*axes, "runs", task.quality, "±", "remaining", "±", "loss"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    if timed:
        table.add_column("s per run", justify="right", no_wrap=True)
    points = {}
    for values, group in groups.items():
        finals = [run.history[-1] for run in group]
        points[values] = point = _point(values[-1], finals, task)
        one = len(group) == 1
        table.add_row(
            *map(plots.shown_value, values), str(len(group)),
            task.show(point.quality), "" if one else task.show(point.quality_spread),
            percent(point.ratio), "" if one else percent(point.ratio_spread),
            f"{mean(record['test_loss'] for record in finals):.4f}",
            *([f"{mean(run.seconds or 0 for run in group):.1f}"] if timed else []),
        )  # fmt: skip
    console.print(table)
    subject = f"{runs[0].config.model} on {runs[0].config.dataset}, {runs[0].config.epochs} epochs"
    if timed:
        methods = dict.fromkeys(values[0] for values in points)
        lines = {name: [p for v, p in points.items() if v[0] == name] for name in methods}
        plots.plot_methods(out / PLOT, lines, subject, task)
        sparsest = {name: min(line, key=lambda point: point.ratio) for name, line in lines.items()}
        pattern = [point._replace(value=name) for name, point in sparsest.items()]
        of_pattern = f"{subject}, the sparsest of each"
    else:
        pattern, of_pattern = [*points.values()], subject
        plots.plot_sweep(out / PLOT, pattern, axes[0], subject, task)
    plots.plot_layer_pattern(out / PLOT_OF_LAYERS, pattern, axes[0], of_pattern)
    written = "  ".join((CSV, PLOT, PLOT_OF_LAYERS))
    console.print(f"written into {escape(str(out))}: {written}", highlight=False, soft_wrap=True)


def _point(value: Any, finals: Sequence[Record], task: Task) -> plots.Point:
    qualities = [record[task.key] for record in finals]
    ratios = [record["remaining_ratio"] for record in finals]
    layers = {name: mean(r["layers"][name] for r in finals) for name in finals[0]["layers"]}
    return plots.Point(value, mean(qualities), _spread(qualities), mean(ratios),
                       _spread(ratios), layers)  # fmt: skip


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _write_csv(runs: Sequence[Run], chosen: Sequence[Mapping[str, Any]], out: Path) -> None:
    task, text = runs[0].config.task, io.StringIO()
    measured = ("epoch", task.key, "test_loss", "train_loss", "remaining_ratio")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*chosen[0], *measured, "seconds"])
    for run, values in zip(runs, chosen, strict=True):
        last = run.history[-1]
        writer.writerow([*values.values(), *(last[name] for name in measured), run.seconds])
    write_atomically(out / CSV, lambda file: file.write(text.getvalue().encode()))
