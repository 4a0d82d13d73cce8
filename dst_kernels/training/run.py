"""Start, resume and compare runs: from a configuration to a finished directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import dst_kernels

from . import display, processes, spread
from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig, option
from .data import Data, load_data
from .device import device_name, select_device
from .errors import UsageError
from .files import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    TWINS,
    cannot_write,
    holds_run,
    is_finished,
    is_leftover,
    keep_vocabulary,
    read_config,
    read_summary,
    write_json,
    write_metrics,
)
from .journal import Journal
from .lock import locked
from .loop import (
    Observer,
    Observers,
    State,
    check_masks,
    new_state,
    restore,
    spread_,
    train,
)
from .models import input_channels
from .processes import first_before_others, from_first
from .results import count_parameters, weights_by_layer, write_comparison, write_results
from .tasks import task_of
from .tracking import require_tracker, track

_FOLDER = "Accepted: a new or empty folder where you may write."


class Interrupted(KeyboardInterrupt):
    """Report Ctrl-C in a run that can be resumed: what is kept, and how to continue."""

    def __init__(self, directory: Path, finished: int, epochs: int) -> None:
        kept = f"{finished} of {epochs} epochs are kept" if finished else "no epoch was finished"
        super().__init__(f"Interrupted: {kept}. To go on:\n  {_resume_command(directory)}")


def start(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train one model into a new directory and return its summary; raises UsageError."""
    if from_first(lambda: _is_restart(out, {".": config})) and out is not None:
        return resume(out, console)
    require_tracker(config)
    data = load(config, download)
    state = new_state(config, data, select_device(config.device))
    check_masks(state, config, data)
    # All input is checked by now, so that wrong input leaves no directory behind.
    directory = from_first(lambda: _new_directory(config.preset, out))
    with locked(directory):
        from_first(lambda: _refuse_used(directory))  # another process may have been here since
        with _resumable(directory, directory, config.epochs):
            from_first(lambda: write_json(directory / CONFIG, config.to_dict()))
        return _run(config, directory, data, state, console, directory)


def compare(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train the dense twin and the sparse model into a new directory; return the comparison."""
    configs = _twins(config)
    if from_first(lambda: _is_restart(out, configs)) and out is not None:
        return resume(out, console)
    require_tracker(config)
    data = load(config, download)
    device = select_device(config.device)
    states = {name: new_state(twin, data, device) for name, twin in configs.items()}
    check_masks(states["sparse"], configs["sparse"], data)
    directory = from_first(lambda: _new_directory(config.preset, out))
    with locked(directory):
        from_first(lambda: _refuse_used(directory))
        with _resumable(directory, directory / TWINS[0], config.epochs):
            from_first(lambda: _write_twins(directory, configs))
        with locked(*(directory / name for name in TWINS)):
            dense, sparse = (
                _run(twin, directory / name, data, states[name], console, directory)
                for name, twin in configs.items()
            )
            return _show_comparison(directory, dense, sparse, console)


def resume(directory: Path, console: Console, **given: Any) -> dict[str, Any]:
    """Continue an interrupted run or comparison, or train a finished one for more epochs.

    `given` replaces fields of the configuration: `epochs`, `device`, `fsdp`.
    """
    begun = from_first(lambda: _runs_in(directory))
    if begun == ["."]:
        with locked(directory):
            resumed = from_first(lambda: _Resumed(directory, given))
            return resumed.go_on(console, directory)
    with locked(directory):
        # A comparison that was killed at its start has only one; that says the other.
        from_first(lambda: _write_twins(directory, _twins(read_config(directory / begun[0]))))
        with locked(*(directory / name for name in TWINS)):
            # Both take the new options before one trains, so that both keep them.
            twins = from_first(lambda: [_Resumed(directory / name, given) for name in TWINS])
            dense, sparse = (twin.go_on(console, directory) for twin in twins)
            return _show_comparison(directory, dense, sparse, console)


def _runs_in(directory: Path) -> list[str]:
    """Return ["."], or which twins have begun; raise UsageError if there is no run."""
    begun = [name for name in (".", *TWINS) if (directory / name / CONFIG).is_file()]
    if not begun:
        raise UsageError(f"--resume {str(directory)!r} {_no_run(directory)}")
    return begun[:1] if "." in begun else begun


def _is_restart(out: Path | None, configs: Mapping[str, RunConfig]) -> bool:
    """Return whether a launcher repeats the command that began the runs in the folder.

    It does so after a crash. Raises UsageError if the folder has anything else.
    """
    if processes.launched():
        if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UsageError(
                "--out is not given, so that a restarted run would begin anew. Accepted: a folder, "
                "or a launcher without restarts."
            )
        if out is not None and holds_run(out):
            begun = {name: read_config(out / name) for name in _runs_in(out)}
            if begun == {name: configs.get(name) for name in begun}:
                return True
    _refuse_used(out)
    return False


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
        return _run(config, directory, data, state, console, root)


def _run(
    config: RunConfig, directory: Path, data: Data, state: State, console: Console, root: Path
) -> dict[str, Any]:
    """Train, write the results and return the summary; `root` is the folder for --resume."""

    first = processes.rank() == 0

    def save(state: State) -> None:
        contents = {
            "config": config.to_dict(),
            "history": state.history,
            "seconds": state.seconds,
            "model": state.weights,
            "best": state.best,
            "controller": spread.whole(state.controller.state_dict() if state.controller else {}),
            "optimizer": spread.whole(state.optimizer.state_dict()),
            "rng": state.rng,
        }

        def write() -> None:
            save_checkpoint(directory / CHECKPOINT, contents)
            write_metrics(directory, state.history, config.task)

        from_first(write)

    if config.threads:
        torch.set_num_threads(config.threads)
    with _resumable(root, directory, config.epochs):
        from_first(lambda: keep_vocabulary(directory, data.vocabulary))
        device, parameters = select_device(config.device), count_parameters(state.model)
        display.show_header(console, config, parameters, directory, device_name(device))
        spread_(state, config)
        with contextlib.ExitStack() as stack:
            observers: list[Observer] = []
            if first:
                parts = weights_by_layer(state.model)
                shapes = {name: tuple(part.weight.shape) for name, part in parts.items()}
                thresholds = [part.threshold for part in parts.values()]
                steps, history = len(data.train), state.history
                tracker = stack.enter_context(track(config, directory, state))
                view = stack.enter_context(display.watch(console, config, history, steps, shapes))
                journal = Journal(directory, console, config, history, steps, thresholds)
                observers = [view, journal, tracker]
            train(state, config, data, Observers(*observers), save)
        report = None if config.dense else dst_kernels.sparsity_report(state.model)
        summary = from_first(lambda: write_results(config, directory, data, state, report))
        if first:
            display.show_result(console, summary, report, directory)
        return summary


@contextlib.contextmanager
def _resumable(root: Path, directory: Path, epochs: int) -> Iterator[None]:
    """Turn Ctrl-C in the run in `directory` into what is kept, and how to resume `root`."""
    try:
        yield
    except KeyboardInterrupt:
        if processes.rank():
            raise
        if not (directory / CONFIG).exists():
            raise KeyboardInterrupt(
                "Interrupted: nothing was written yet. To start again, give the same command."
            ) from None
        finished = 0
        if (directory / CHECKPOINT).exists():
            checkpoint = load_checkpoint(directory / CHECKPOINT)
            history = checkpoint["history"]
            write_metrics(directory, history, task_of(checkpoint["config"].get("dataset")))
            finished = len(history)
        raise Interrupted(root, finished, epochs) from None


def _resume_command(directory: Path) -> str:
    local_processes = processes.on_this_machine()[1]
    command = "dst-kernels"
    if processes.joined():
        command = f"torchrun --nproc-per-node {local_processes} -m dst_kernels"
    return f"{command} train --resume {shlex.quote(str(directory))}"


def _twins(config: RunConfig) -> dict[str, RunConfig]:
    return {name: dataclasses.replace(config, dense=name == "dense") for name in TWINS}


def _write_twins(directory: Path, configs: dict[str, RunConfig]) -> None:
    """Write the configurations of both twins that are missing; raise UsageError if it cannot."""
    for name, config in configs.items():
        try:
            (directory / name).mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(directory / name, error) from error
        if not (directory / name / CONFIG).exists():
            write_json(directory / name / CONFIG, config.to_dict())


def _show_comparison(
    directory: Path, dense: dict[str, Any], sparse: dict[str, Any], console: Console
) -> dict[str, Any]:
    comparison = from_first(lambda: write_comparison(directory, dense, sparse))
    display.show_comparison(console, dense, sparse, directory)
    return comparison


def load(config: RunConfig, download: bool = False) -> Data:
    """Read the configured data set; raises UsageError."""
    # Check the model's name first: that takes no time, but the data may need a download.
    channels = input_channels(config.model)
    least = 2 * config.accumulate * processes.count()
    if config.batch_size < least:
        raise UsageError(
            f"--batch-size {config.batch_size} with --accumulate {config.accumulate} on "
            f"{processes.count()} processes leaves parts of less than 2 samples. Accepted: a batch "
            f"size of at least {least}, or fewer parts."
        )
    device = select_device(config.device)
    if config.graph and (device.type != "cuda" or least > 2):
        raise UsageError(
            f"--graph with {processes.count()} processes on {device.type}, --accumulate "
            f"{config.accumulate}. Accepted: one process on a GPU, and --accumulate 1."
        )
    return first_before_others(lambda: load_data(config, device, channels, download))


def _refuse_used(out: Path | None) -> None:
    """Raise UsageError if the folder has anything in it but what a killed start leaves."""
    try:
        names = sorted(path.name for path in out.iterdir() if not is_leftover(path)) if out else []
    except (FileNotFoundError, NotADirectoryError):
        return  # it can be made, or the error comes with that
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be read: {error.strerror}. {_FOLDER}"
        ) from error
    if out is None or not names:
        return
    if holds_run(out):
        raise UsageError(
            f"--out {str(out)!r} already holds a run, which would be overwritten. {_FOLDER} "
            f"To go on with the old run:\n  {_resume_command(out)}"
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UsageError(
        f"--out {str(out)!r} is not empty: it has {', '.join(map(repr, names[:3]))}{more}. "
        f"{_FOLDER}"
    )


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


def _new_directory(preset: str, out: Path | None) -> Path:
    """Make and return the run's directory; a default name that exists gets a number."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        name, number = f"runs/{preset}-{datetime.now():%Y%m%d-%H%M%S}", 1
        while True:
            directory = Path(name if number == 1 else f"{name}-{number}")
            try:
                directory.mkdir(parents=True)
                return directory
            except FileExistsError:
                if not directory.is_dir():
                    raise
            number += 1
    except OSError as error:
        raise UsageError(
            f"--out {str(out or 'runs')!r} cannot be made: {error.strerror}. {_FOLDER}"
        ) from error
