"""Start, resume and compare runs: from a configuration to a finished directory."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from . import display
from .checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from .config import RunConfig
from .data import Data, load_data
from .device import device_name, select_device
from .errors import UsageError
from .files import (
    CONFIG,
    SUMMARY,
    TWINS,
    holds_run,
    read_config,
    read_summary,
    write_json,
    write_metrics,
)
from .loop import State, new_state, train
from .models import input_channels
from .results import count_parameters, weights_by_layer, write_comparison, write_results

_FOLDER = "Accepted: a new or empty folder where you may write."


class Interrupted(KeyboardInterrupt):
    """Report Ctrl-C in a run that can be resumed: what is kept, and how to continue."""

    def __init__(self, directory: Path, finished: int, epochs: int) -> None:
        kept = f"{finished} of {epochs} epochs are kept" if finished else "no epoch was finished"
        super().__init__(
            f"Interrupted: {kept}. To go on:\n  dst-kernels train --resume {directory}"
        )


def start(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train one model into a new directory and return its summary; raises UsageError."""
    _refuse_old_run(out)
    data = _load(config, download)
    state = new_state(config, data, select_device(config.device))
    # All input is checked by now, so that wrong input leaves no directory behind.
    directory = _new_directory(config.preset, out)
    return _run(config, directory, data, state, console, directory)


def compare(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train the dense twin and the sparse model into a new directory; return the comparison."""
    _refuse_old_run(out)
    data = _load(config, download)
    configs = {name: dataclasses.replace(config, dense=name == "dense") for name in TWINS}
    device = select_device(config.device)
    states = {name: new_state(twin, data, device) for name, twin in configs.items()}
    directory = _new_directory(config.preset, out)
    for name, twin in configs.items():  # both before training: resuming needs both
        (directory / name).mkdir()
        write_json(directory / name / CONFIG, twin.to_dict())
    for name, twin in configs.items():
        _run(twin, directory / name, data, states[name], console, directory)
    return _show_comparison(directory, console)


def resume(
    directory: Path, console: Console, *, epochs: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Continue an interrupted run or comparison, or train a finished one for more epochs."""
    if all((directory / name / CONFIG).is_file() for name in TWINS):
        for name in TWINS:
            _resume_one(directory / name, console, epochs, device, directory)
        return _show_comparison(directory, console)
    return _resume_one(directory, console, epochs, device, directory)


def _resume_one(
    directory: Path, console: Console, epochs: int | None, device: str | None, root: Path
) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        problem = "holds no run" if directory.is_dir() else "is not a folder"
        raise UsageError(
            f"--resume {str(directory)!r} {problem}. Accepted: a folder written by "
            "dst-kernels train."
        )
    config, checkpoint, finished = read_config(directory), None, 0
    if (directory / CHECKPOINT).exists():
        checkpoint = load_checkpoint(directory / CHECKPOINT)
        finished = len(checkpoint["history"])
        _refuse_edited(directory, config, RunConfig.from_dict(checkpoint["config"]))
    given: dict[str, Any] = {"epochs": epochs, "device": device}
    config = dataclasses.replace(
        config, **{name: value for name, value in given.items() if value is not None}
    )
    if config.epochs < finished:
        raise UsageError(
            f"--epochs {config.epochs} is less than the {finished} epochs which "
            f"{directory} has already trained. Accepted: {finished} or more."
        )
    if config.epochs == finished and (directory / SUMMARY).exists():
        summary = read_summary(directory)
        if summary.get("epochs") == finished:
            console.print(
                f"{escape(str(directory))} is finished: {finished} of {finished} epochs. "
                "To train on, give a larger --epochs.",
                highlight=False,
                soft_wrap=True,
            )
            return summary
    data = _load(config)
    state = new_state(config, data, select_device(config.device))
    if checkpoint is not None:
        try:
            # Masked layers also load dense checkpoints, but here a missing threshold is damage.
            if set(checkpoint["model"]) != set(state.model.state_dict()):
                raise ValueError("it holds other parameters.")
            state.model.load_state_dict(checkpoint["model"])
            state.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--resume: {directory / CHECKPOINT} does not fit the model {config.model!r} which "
                f"its configuration describes: {str(error).splitlines()[0]} "
                "Accepted: a folder written by dst-kernels train."
            ) from error
        state.history, state.seconds = checkpoint["history"], checkpoint["seconds"]
        state.rng = checkpoint["rng"]
    return _run(config, directory, data, state, console, root)


def _run(
    config: RunConfig, directory: Path, data: Data, state: State, console: Console, root: Path
) -> dict[str, Any]:
    """Train, write the results and return the summary; `root` is the folder for --resume."""

    def save(state: State) -> None:
        contents = {
            "config": config.to_dict(),
            "history": state.history,
            "seconds": state.seconds,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "rng": state.rng,
        }
        save_checkpoint(directory / CHECKPOINT, contents)
        write_metrics(directory, state.history)

    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        write_json(directory / CONFIG, config.to_dict())
        device, parameters = select_device(config.device), count_parameters(state.model)
        display.show_header(console, config, parameters, directory, device_name(device))
        shapes = {
            name: tuple(part.weight.shape) for name, part in weights_by_layer(state.model).items()
        }
        with display.watch(console, config, state.history, len(data.train), shapes) as observer:
            train(state, config, data, observer, save)
        summary, report = write_results(config, directory, data, state)
        display.show_result(console, summary, report, directory)
        return summary
    except KeyboardInterrupt:
        finished = 0
        if (directory / CHECKPOINT).exists():
            history = load_checkpoint(directory / CHECKPOINT)["history"]
            write_metrics(directory, history)
            finished = len(history)
        raise Interrupted(root, finished, config.epochs) from None


def _show_comparison(directory: Path, console: Console) -> dict[str, Any]:
    comparison = write_comparison(directory)
    display.show_comparison(console, comparison["dense"], comparison["sparse"], directory)
    return comparison


def _load(config: RunConfig, download: bool = False) -> Data:
    # Check the model's name first: that takes no time, but the data may need a download.
    channels = input_channels(config.model)
    return load_data(config, select_device(config.device), channels, download)


def _refuse_old_run(out: Path | None) -> None:
    if out is not None and holds_run(out):
        raise UsageError(
            f"--out {str(out)!r} already holds a run, which would be overwritten. {_FOLDER} "
            f"To go on with the old run: --resume {out}"
        )


def _refuse_edited(directory: Path, config: RunConfig, trained: RunConfig) -> None:
    """Raise UsageError if config.json differs from the configuration that was trained."""
    was, now = trained.to_dict(), config.to_dict()
    for name in sorted(set(was) - {"epochs", "device"}):
        if now[name] != was[name]:
            raise UsageError(
                f"--resume: {directory / CONFIG} says {name} {now[name]!r}, but the run was "
                f"trained with {was[name]!r}. Accepted: the old value, or a new run."
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
