"""Show progress and results: a live view while training, tables at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import processes
from .config import RunConfig
from .files import Record
from .loop import Observer
from .tasks import Task, task_of

if TYPE_CHECKING:
    from dst_kernels import SparsityReport

_RATIO_COLOR = "cyan"
_REFRESHES_PER_SECOND = 8


def percent(share: float, digits: int = 2) -> str:
    """Return a share from 0 to 1 as a percentage."""
    return f"{100 * share:.{digits}f} %"


def show_header(
    console: Console, config: RunConfig, weights: int, directory: Path, device: str
) -> None:
    """Print one line on what is trained, and one on where the results go."""
    count = processes.count()
    kind = "dense twin" if config.dense else config.kind
    facts = [
        f"[bold]{config.model}[/] on [bold]{config.dataset}[/]",
        f"{weights:,} parameters",
        f"[bold]{kind}[/]",
        f"{config.optimizer} lr {config.lr:g}",
        f"batch {config.batch_size}",
        f"seed {config.seed}",
        *([] if config.dense else [config.execution]),
        *(["compiled"] if config.compile else []),
        *(["CUDA graph"] if config.graph else []),
        *([f"{count} processes, {'FSDP2' if config.fsdp else 'DDP'}"] if count > 1 else []),
        device + (" bf16" if config.amp == "bf16" else ""),
    ]
    console.print()
    console.print(" · ".join(facts), highlight=False, soft_wrap=True)
    console.print(f"[dim]writing to {escape(str(directory))}[/]", highlight=False, soft_wrap=True)


@contextmanager
def watch(
    console: Console,
    config: RunConfig,
    history: list[Record],
    steps: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Observer]:
    """Show a live view of training, if the console is a terminal.

    `steps` are those of an epoch, `shapes` those of the weights by name.
    """
    if not console.is_terminal:
        yield Observer()
        return
    view = _View(console, config, history, steps, shapes)
    with Live(
        view,
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        transient=True,
    ):
        yield view


class _Rate(ProgressColumn):
    """Show how many samples a second are trained with."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def render(self, task: ProgressTask) -> Text:
        return Text(f"{self.batch_size * (task.speed or 0):,.0f} samples/s", style="dim")


class _View(Observer):
    """Show a live view, which rich renders repeatedly from its own thread."""

    def __init__(
        self,
        console: Console,
        config: RunConfig,
        history: list[Record],
        steps: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.console, self.shapes, self.kind = console, shapes, config.task
        self.record: Record | None = history[-1] if history else None
        self.progress = Progress(
            TextColumn("epoch"),
            TextColumn("{task.fields[epoch]}/" + str(config.epochs)),
            BarColumn(bar_width=40),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("left"),
            _Rate(config.batch_size),
            console=console,
        )
        self.task = self.progress.add_task(
            "", total=config.epochs * steps, completed=len(history) * steps, epoch=len(history)
        )

    def step(self, total: Tensor, samples: int) -> None:
        self.progress.advance(self.task)

    def epoch(self, record: Record) -> None:
        self.record = record
        self.progress.update(self.task, epoch=record["epoch"])

    def __rich__(self) -> Group:
        if self.record is None:
            return Group(self.progress)
        return Group(
            self.progress, _metrics_line(self.record, self.kind), self._ratios(self.record)
        )

    def _ratios(self, record: Record) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("layer", header_style="dim")
        table.add_column("shape", header_style="dim", style="dim", justify="right")
        table.add_column("remaining", header_style="dim", justify="right", min_width=9)
        table.add_column("", width=32)
        room = max(self.console.height - 7, 3)
        layers = list(record["layers"].items())
        for name, ratio in layers[:room]:
            table.add_row(name, _shape(self.shapes[name]), percent(ratio, 1), _bar(ratio))
        if len(layers) > room:
            table.add_row(f"[dim]and {len(layers) - room} more[/]")
        if layers:
            ratio = record["remaining_ratio"]
            table.add_row("[bold]model[/]", "", f"[bold]{percent(ratio, 1)}[/]", _bar(ratio))
        return table


def _bar(ratio: float) -> Bar:
    return Bar(size=1, begin=0, end=ratio, width=32, color=_RATIO_COLOR, bgcolor="grey23")


def _metrics_line(record: Record, task: Task) -> Text:
    return Text.from_markup(
        f"[dim]train loss[/] {record['train_loss']:.4f}   "
        f"[dim]test loss[/] {record['test_loss']:.4f}   "
        f"[dim]test {task.quality}[/] [bold]{task.show(record[task.key])}[/]\n"
    )


def show_result(
    console: Console, summary: Mapping[str, Any], report: SparsityReport | None, directory: Path
) -> None:
    """Print the final tables of one run."""
    if report is not None:
        console.print(_layer_table(report))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    task, ratio = task_of(summary["dataset"]), summary["remaining_ratio"]
    quality = task.show(summary[task.key])
    table.add_row(f"test {task.quality}", f"[bold]{quality}[/]", "of the final epoch")
    if report is not None:
        table.add_row("remaining", f"[bold]{percent(ratio)}[/]", _times_fewer(ratio))
    best = summary["best"]
    if best is not None:
        epoch = f"of epoch {best['epoch']}, the best in validation"
        table.add_row(f"test {task.quality}", task.show(best[task.key]), epoch)
        if report is not None:
            ratio = best["remaining_ratio"]
            table.add_row("remaining", percent(ratio), f"then, {_times_fewer(ratio)}")
    table.add_row("time", f"{summary['seconds']:.1f} s", f"{summary['epochs']} epochs")
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    table.add_row("written", escape(str(directory)), "")
    console.print(table, highlight=False)
    console.print(f"[dim]{'  '.join(names)}[/]", highlight=False)


def show_evaluation(
    console: Console,
    config: RunConfig,
    directory: Path,
    record: Record,
    measured: tuple[float, float],
    report: SparsityReport | None,
) -> None:
    """Print the loss and quality that were measured, beside those recorded after training."""
    console.print(f"\n[bold]{escape(str(directory))}[/]", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(_layer_table(report))
    (loss, quality), task = measured, config.task
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    then = f"of epoch {record['epoch']} of {config.epochs}, when it was"
    before = f"{then} {task.show(record[task.key])}"
    table.add_row(f"test {task.quality}", f"[bold]{task.show(quality)}[/]", before)
    table.add_row("test loss", f"{loss:.4f}", f"{then} {record['test_loss']:.4f}")
    if report is not None:
        ratio = report.remaining_ratio
        table.add_row("remaining", f"[bold]{percent(ratio)}[/]", _times_fewer(ratio))
    console.print(table, highlight=False)


def _threshold(value: float) -> str:
    return "fixed" if math.isnan(value) else f"{value:.3f}"


def _layer_table(report: SparsityReport) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", overflow="fold")
    # A method with fixed masks has no thresholds to show.
    shown = not all(math.isnan(layer.threshold_mean) for layer in report.layers)
    thresholds = ("t mean", "t min", "t max") if shown else ()
    for name in ("shape", "remaining", "kept", "of", "empty rows", *thresholds):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in report.layers:
        values = layer.threshold_mean, layer.threshold_min, layer.threshold_max
        table.add_row(
            layer.name,
            _shape(layer.shape),
            percent(layer.remaining_ratio),
            f"{layer.kept:,}",
            f"{layer.total:,}",
            f"{layer.dead_rows:,}",
            *map(_threshold, values if shown else ()),
        )
    table.add_section()
    ratio, kept, total = percent(report.remaining_ratio), f"{report.kept:,}", f"{report.total:,}"
    table.add_row("model", "", ratio, kept, total, style="bold")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _times_fewer(ratio: float) -> str:
    return f"{1 / ratio:.1f} times fewer weights" if ratio else "no weight is left"


def show_comparison(
    console: Console, dense: Mapping[str, Any], sparse: Mapping[str, Any], directory: Path
) -> None:
    """Print the results of the dense and the sparse twin, and their differences."""
    table = Table(box=SIMPLE_HEAD, header_style="dim")
    table.add_column("final epoch")
    for name in ("dense", "sparse", "difference"):
        table.add_column(name, justify="right")
    task, ratio = task_of(sparse["dataset"]), sparse["remaining_ratio"]
    difference = task.show_difference(sparse[task.key] - dense[task.key])
    table.add_row(
        f"test {task.quality}",
        task.show(dense[task.key]),
        task.show(sparse[task.key]),
        f"[bold]{difference}[/]",
    )
    table.add_row(
        "test loss",
        f"{dense['test_loss']:.4f}",
        f"{sparse['test_loss']:.4f}",
        f"{sparse['test_loss'] - dense['test_loss']:+.4f}",
    )
    table.add_row("remaining", percent(1.0), percent(ratio), f"[bold]{_times_fewer(ratio)}[/]")
    table.add_row(
        "weights",
        f"{sparse['masked_weights']:,}",
        f"{sparse['kept_weights']:,}",
        f"{sparse['kept_weights'] - sparse['masked_weights']:+,}",
    )
    table.add_row(
        "time",
        f"{dense['seconds']:.1f} s",
        f"{sparse['seconds']:.1f} s",
        f"{sparse['seconds'] - dense['seconds']:+.1f} s",
    )
    console.print(table)
    console.print(f"written  {escape(str(directory))}", highlight=False, soft_wrap=True)
