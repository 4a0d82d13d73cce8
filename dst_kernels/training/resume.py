"""Continue runs and comparisons that were interrupted, or train finished ones on."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig, option
from .device import select_device
from .errors import UsageError
from .files import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    TWINS,
    is_finished,
    is_leftover,
    keep_vocabulary,
    read_config,
    read_summary,
    write_json,
)
from .lock import locked
from .processes import from_first
from .run import load, run, show_comparison, twins_of, write_twins
from .state import check_masks, new_state, restore
from .tracking import require_tracker


def resume(directory: Path, console: Console, **given: Any) -> dict[str, Any]:
    """Continue an interrupted run or comparison, or train a finished one for more epochs.

    `given` replaces fields of the configuration: `epochs`, `device`, `fsdp`.
    """
    begun = from_first(lambda: runs_in(directory))
    if begun == ["."]:
        with locked(directory):
            resumed = from_first(lambda: _Resumed(directory, given))
            return resumed.go_on(console, directory)
    with locked(directory):
        # A comparison that was killed at its start has only one; that says the other.
        from_first(lambda: write_twins(directory, twins_of(read_config(directory / begun[0]))))
        with locked(*(directory / name for name in TWINS)):
            # Both take the new options before one trains, so that both keep them.
            twins = from_first(lambda: [_Resumed(directory / name, given) for name in TWINS])
            dense, sparse = (twin.go_on(console, directory) for twin in twins)
            return show_comparison(directory, dense, sparse, console)


def runs_in(directory: Path) -> list[str]:
    """Return ["."], or which twins have begun; raise UsageError if there is no run."""
    begun = [name for name in (".", *TWINS) if (directory / name / CONFIG).is_file()]
    if not begun:
        raise UsageError(f"--resume {str(directory)!r} {_no_run(directory)}")
    return begun[:1] if "." in begun else begun


class _Resumed:
    """Read a run that stopped or finished; write down the options that are `given` anew.

    Raises UsageError if its files are damaged or contradict each other.
    """

    def __init__(self, directory: Path, given: dict[str, Any]) -> None:
        self.directory, self.checkpoint = directory, None
        config = dataclasses.replace(read_config(directory), **given)
        if not (directory / CHECKPOINT).exists():
            if (directory / METRICS).exists():
                raise UsageError(
                    f"--resume: {directory / CHECKPOINT} is missing, but {directory / METRICS} has "
                    "epochs. Accepted: a folder with its checkpoint, or a new run."
                )
            self.config, self.finished = config, False
            write_json(directory / CONFIG, config.to_dict())
            return
        self.checkpoint = load_checkpoint(directory / CHECKPOINT)
        try:
            trained = RunConfig.from_dict(self.checkpoint["config"])
        except UsageError as error:
            raise UsageError(f"--resume: {directory / CHECKPOINT}: config: {error}") from error
        _refuse_edited(directory, config, trained, given)
        epochs = len(self.checkpoint["history"])
        if config.epochs < epochs:
            raise UsageError(
                f"--epochs {config.epochs} is less than the {epochs} epochs which "
                f"{directory} has already trained. Accepted: {epochs} or more."
            )
        self.config = config
        self.finished = config.epochs == epochs and is_finished(directory)
        if not self.finished and config != trained:
            new = {**self.checkpoint, "config": config.to_dict()}
            save_checkpoint(directory / CHECKPOINT, new)
            write_json(directory / CONFIG, config.to_dict())

    def go_on(self, console: Console, root: Path) -> dict[str, Any]:
        """Train to the last epoch and return the summary; `root` is the folder for --resume."""
        directory, config = self.directory, self.config
        if self.finished:
            console.print(
                f"{escape(str(directory))} is finished: {config.epochs} of {config.epochs} epochs. "
                "To train on, give a larger --epochs.",
                highlight=False,
                soft_wrap=True,
            )
            return from_first(lambda: read_summary(directory))
        require_tracker(config)
        data = load(config)
        from_first(lambda: keep_vocabulary(directory, data.vocabulary))
        device, initial = select_device(config.device), self.checkpoint is None
        state = new_state(config, data, device, initial=initial)
        if self.checkpoint is None:
            check_masks(state, config, data)
        else:
            try:
                restore(state, config, self.checkpoint)
            except UsageError as error:
                raise UsageError(
                    f"--resume: {directory / CHECKPOINT} does not fit the model {config.model!r} "
                    f"which its configuration describes: {error}"
                ) from error
        return run(config, directory, data, state, console, root)


def _no_run(directory: Path) -> str:
    """Say why a folder cannot be resumed, and what can be done."""
    accepted = "Accepted: a folder written by dst-kernels train."
    if not directory.is_dir():
        return f"is not a folder. {accepted}"
    if any(directory.iterdir()) and all(map(is_leftover, directory.iterdir())):
        return (
            "holds no run: it was stopped before its configuration was written. "
            f"{accepted} To start it again, give its options with "
            f"--out {shlex.quote(str(directory))}"
        )
    return f"holds no run. {accepted}"


def _refuse_edited(
    directory: Path, config: RunConfig, trained: RunConfig, given: dict[str, Any]
) -> None:
    """Raise UsageError if config.json differs from what was trained in options not `given`."""
    was, now = trained.to_dict(), config.to_dict()
    for name in sorted(set(was) - set(given)):
        if now[name] != was[name]:
            also = f", a new one by {option(name)}" if name in ("epochs", "device") else ""
            raise UsageError(
                f"--resume: {directory / CONFIG} says {name} {now[name]!r}, but the run was "
                f"trained with {was[name]!r}. Accepted: the old value{also}, or a new run."
            )
