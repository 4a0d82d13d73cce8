"""Run what is configured, from data to a finished directory."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dst_kernels

from . import display, processes, spread
from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig
from .data import Data, load_data
from .device import device_name, select_device
from .errors import UsageError
from .files import (
    CHECKPOINT,
    CONFIG,
    TWINS,
    cannot_write,
    keep_vocabulary,
    write_json,
    write_metrics,
)
from .journal import Journal
from .loop import Observer, Observers, train
from .models import input_channels
from .processes import first_before_others, from_first
from .results import count_parameters, weights_by_layer, write_comparison, write_results
from .state import State, spread_
from .tasks import task_of
from .tracking import track


class Interrupted(KeyboardInterrupt):
    """Report Ctrl-C in a run that can be resumed: what is kept, and how to continue."""

    def __init__(self, directory: Path, finished: int, epochs: int) -> None:
        kept = f"{finished} of {epochs} epochs are kept" if finished else "no epoch was finished"
        super().__init__(f"Interrupted: {kept}. To go on:\n  {resume_command(directory)}")


def run(
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
            "ever": state.ever,
            **{
                name: spread.whole(helper.state_dict() if helper else {})
                for name, helper in state.helpers.items()
            },
            "optimizer": spread.whole(state.optimizer.state_dict()),
            "rng": state.rng,
        }

        def write() -> None:
            save_checkpoint(directory / CHECKPOINT, contents)
            write_metrics(directory, state.history, config.task)

        from_first(write)

    if config.threads:
        torch.set_num_threads(config.threads)
    with resumable(root, directory, config.epochs):
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
def resumable(root: Path, directory: Path, epochs: int) -> Iterator[None]:
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


def resume_command(directory: Path) -> str:
    """Return the command that goes on with what is in the folder, on as many processes as now."""
    local_processes = processes.on_this_machine()[1]
    command = "dst-kernels"
    if processes.joined():
        command = f"torchrun --nproc-per-node {local_processes} -m dst_kernels"
    return f"{command} train --resume {shlex.quote(str(directory))}"


def twins_of(config: RunConfig) -> dict[str, RunConfig]:
    """Return the configurations of a comparison, by the names of their folders."""
    return {name: dataclasses.replace(config, dense=name == "dense") for name in TWINS}


def write_twins(directory: Path, configs: dict[str, RunConfig]) -> None:
    """Write the configurations of both twins that are missing; raise UsageError if it cannot."""
    for name, config in configs.items():
        try:
            (directory / name).mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(directory / name, error) from error
        if not (directory / name / CONFIG).exists():
            write_json(directory / name / CONFIG, config.to_dict())


def show_comparison(
    directory: Path, dense: dict[str, Any], sparse: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Write, print and return the comparison of two finished twins by their summaries."""
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
            f"{config.accumulate}. Accepted: one process on a CUDA device, and --accumulate 1."
        )
    return first_before_others(lambda: load_data(config, device, channels, download))
