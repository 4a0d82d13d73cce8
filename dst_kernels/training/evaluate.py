"""Evaluate a run's model as it was after its last epoch, or an exported one, on the test set."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dst_kernels

from . import display
from .checkpoint import load_checkpoint
from .config import RunConfig
from .device import select_device
from .errors import UsageError
from .export import read_export
from .files import CHECKPOINT, SUMS, TWINS, is_finished, keep_vocabulary
from .loop import evaluate as measure
from .run import load
from .state import new_state, restore


def evaluate(path: Path, console: Console, given: dict[str, Any]) -> None:
    """Evaluate the run in the folder `path`, both of a comparison, or the exported model there.

    Prints what is found. `given` replaces fields of the configuration: `data_dir`, `device`. Raises
    UsageError where there is no checkpoint, or one that is damaged or does not fit, or a file that
    was not exported; warns of results that are not those which the run wrote.
    """
    if path.is_file():
        return _evaluate_exported(path, console, given)
    both = [path / name for name in TWINS if (path / name / CHECKPOINT).is_file()]
    for each in both or [path]:
        _evaluate(each, console, given)


def _evaluate_exported(path: Path, console: Console, given: dict[str, Any]) -> None:
    exported = read_export(path)
    config = dataclasses.replace(exported.config, **given)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = load(config)
    found = data.shape, data.classes, data.vocabulary
    if found != (exported.shape, exported.classes, exported.vocabulary):
        raise UsageError(
            f"FILE {path} is of another data set: inputs {list(exported.shape)} of "
            f"{exported.classes} classes, but --data-dir has {list(data.shape)} of {data.classes}. "
            "Accepted: the data with which the run was trained."
        )
    model = exported.model.to(select_device(config.device))
    measured = measure(model, config, data.test)
    record = {**exported.record, "epoch": exported.record["epochs"]}
    display.show_evaluation(console, config, path, record, measured, None)


def _evaluate(directory: Path, console: Console, given: dict[str, Any]) -> None:
    path = directory / CHECKPOINT
    if not path.is_file():
        raise UsageError(
            f"{directory} has no {CHECKPOINT}. Accepted: a folder in which dst-kernels train has "
            "finished an epoch."
        )
    if (directory / SUMS).exists() and not is_finished(directory):
        warnings.warn(
            f"{directory}: the results are not those that the run wrote (sha256sum -c {SUMS})",
            stacklevel=2,
        )
    checkpoint = load_checkpoint(path, "DIR")
    try:
        config = dataclasses.replace(RunConfig.from_dict(checkpoint["config"]), **given)
    except UsageError as error:
        raise UsageError(f"DIR: {path}: config: {error}") from error
    if config.threads:
        torch.set_num_threads(config.threads)
    data = load(config)
    keep_vocabulary(directory, data.vocabulary)
    state = new_state(config, data, select_device(config.device), initial=False)
    try:
        restore(state, config, checkpoint)
    except UsageError as error:
        raise UsageError(f"DIR: {path} does not fit the model {config.model!r}: {error}") from error
    measured = measure(state.model, config, data.test)
    report = None if config.dense else dst_kernels.sparsity_report(state.model)
    display.show_evaluation(console, config, directory, state.history[-1], measured, report)
