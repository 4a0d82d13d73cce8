"""Write a run's journal: lines in train.log, and on the console where it is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ..ops.dtensor import is_dtensor
from .config import RunConfig
from .files import LOG, Record, cannot_write
from .loop import Observer, diverged
from .masks import was_restarted

_EVERY = 30.0  # seconds between two lines within an epoch: each waits for the device
_WITHOUT_EFFECT, _UNTOUCHED = 3, 0.99  # epochs; the loss alone prunes some tenths of a percent


class Journal(Observer):
    """Write a line after each epoch and, within long ones, every 30 seconds; warn of trouble.

    Trouble is a loss that is not finite (DivergedError, at the next line), a layer that keeps no
    weight or that the guard has restarted, `thresholds` of which none moves in the first epoch that
    is trained here, and an alpha that prunes next to nothing. Raises UsageError where train.log
    cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        console: Console,
        config: RunConfig,
        history: list[Record],
        steps: int,
        thresholds: Sequence[Tensor] = (),
    ) -> None:
        self.path, self.console, self.config = directory / LOG, console, config
        self.history, self.steps = history, steps
        self.thresholds = thresholds
        self.at_start = [_own_part(threshold).clone() for threshold in thresholds]
        self.step_of_epoch = self.steps_done = 0
        self.started = self.last = time.perf_counter()
        self._log(f"{config.model} on {config.dataset}, from epoch {len(history) + 1}")

    def step(self, total: Tensor, samples: int) -> None:
        self.step_of_epoch += 1
        self.steps_done += 1
        now = time.perf_counter()
        if now - self.last < _EVERY:
            return
        self.last, value, epoch = now, float(total) / samples, len(self.history) + 1
        if not math.isfinite(value):
            done = f"{self.step_of_epoch} of {self.steps} steps"
            raise diverged(self.config, f"the mean loss of epoch {epoch} is {value:g} after {done}")
        per_step = (now - self.started) / self.steps_done
        left = (self.config.epochs - epoch + 1) * self.steps - self.step_of_epoch
        self._line(
            f"epoch {epoch}/{self.config.epochs}  step {self.step_of_epoch}/{self.steps}"
            f"  train loss {value:.4f}  {self.config.batch_size / per_step:,.0f} samples/s"
            f"  {duration(left * per_step)} left"
        )

    def epoch(self, record: Record) -> None:
        epochs, task = self.config.epochs, self.config.task
        self.step_of_epoch, self.last = 0, time.perf_counter()
        losses = "".join(
            f"  {kind} loss {record[f'{kind}_loss']:.4f}"
            for kind in ("train", "validation", "test")
            if f"{kind}_loss" in record
        )
        self._line(
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}{losses}"
            f"  test {task.quality} {task.show(record[task.key]):>8}"
            f"  remaining {100 * record['remaining_ratio']:>6.2f} %"
            f"  {self.last - self.started:.1f} s"
        )
        for trouble in self._troubles(record):
            self._log(f"warning: {trouble}")
            self.console.print(f"[bold yellow]Warning:[/] {escape(trouble)}", soft_wrap=True)

    def _troubles(self, record: Record) -> list[str]:
        found, epoch, config = [], record["epoch"], self.config
        advice = ": try a smaller --alpha"
        if config.rival is not None:
            advice = ": try a larger --density" if config.density is not None else ""
        before = self.history[-2]["layers"] if len(self.history) > 1 else {}
        for name, ratio in record["layers"].items():
            if ratio == 0:
                found.append(f"{name} keeps no weight after epoch {epoch}{advice}")
            elif config.rival is None and was_restarted(before.get(name, 1.0), ratio):
                found.append(
                    f"{name} was restarted with all weights in epoch {epoch}, since no more than "
                    f"--reset-ratio {config.reset_ratio} would have remained{advice}"
                )
        if config.dense or config.rival is not None or epoch <= config.warmup_epochs:
            return found
        pairs = zip(map(_own_part, self.thresholds), self.at_start, strict=True)
        if self.at_start and all(torch.equal(now, then) for now, then in pairs):
            lr = config.lr if config.threshold_lr is None else config.threshold_lr
            found.append(
                f"no threshold has moved in epoch {epoch}: --threshold-lr is {lr:g}, "
                f"--{config.kind}: try larger ones"
            )
        self.thresholds = self.at_start = []  # looked at once
        untouched = all(each["remaining_ratio"] > _UNTOUCHED for each in self.history)
        is_due = epoch == config.warmup_epochs + _WITHOUT_EFFECT and config.target is None
        if is_due and untouched:
            found.append(
                f"--alpha {config.alpha:g} leaves {100 * record['remaining_ratio']:.2f} % of the "
                f"weights after {epoch} epochs: try a larger --alpha or --threshold-lr"
            )
        return found

    def _line(self, text: str) -> None:
        self._log(text)
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _log(self, text: str) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _own_part(threshold: Tensor) -> Tensor:
    """Return what this process has of a threshold: looking at all of it would be collective."""
    return (threshold.to_local() if is_dtensor(threshold) else threshold).detach()


def duration(seconds: float) -> str:
    """Return a number of seconds as text: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
