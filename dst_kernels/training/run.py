"""A run from its configuration to its finished directory: start, resume, compare."""

from __future__ import annotations

import dataclasses
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dst_kernels

from . import display
from .checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint, write_atomically
from .config import RunConfig
from .data import Data, load_data
from .errors import UsageError
from .files import (
    COMPARISON,
    CONFIG,
    MODEL,
    SUMMARY,
    TWINS,
    holds_run,
    read_config,
    read_metrics,
    read_summary,
    write_json,
    write_metrics,
)
from .loop import State, new_state, train
from .models import input_channels

__all__ = ["Interrupted", "compare", "resume", "start"]

_FOLDER = "Accepted: a new or empty folder where you may write."


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run which can go on: says what is kept and how to resume."""

    def __init__(self, directory: Path, finished: int, epochs: int) -> None:
        kept = f"{finished} of {epochs} epochs are kept" if finished else "no epoch was finished"
        super().__init__(
            f"Interrupted: {kept}. To go on:\n  dst-kernels train --resume {directory}"
        )


def start(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train one model into a new directory; returns its summary."""
    _refuse_old_run(out)
    data = _load(config, download)
    state = new_state(config, data, _device(config.device))
    # Only now, when nothing in the input can be wrong any more, is anything written.
    directory = _new_directory(config.preset, out)
    return _run(config, directory, data, state, console, directory)


def compare(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train the dense twin and the sparse model into a new directory; returns the comparison."""
    _refuse_old_run(out)
    data = _load(config, download)
    configs = {name: dataclasses.replace(config, dense=name == "dense") for name in TWINS}
    states = {
        name: new_state(config, data, _device(config.device)) for name, config in configs.items()
    }
    directory = _new_directory(config.preset, out)
    for name, twin in configs.items():  # both at once: a comparison is resumed from these
        (directory / name).mkdir()
        write_json(directory / name / CONFIG, twin.to_dict())
    for name, twin in configs.items():
        _run(twin, directory / name, data, states[name], console, directory)
    return _finish_comparison(directory, console)


def resume(
    directory: Path, console: Console, *, epochs: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Go on with an interrupted run or comparison, or lengthen a finished one."""
    if all((directory / name / CONFIG).is_file() for name in TWINS):
        for name in TWINS:
            _resume_one(directory / name, console, epochs, device, directory)
        return _finish_comparison(directory, console)
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
    config, checkpoint = read_config(directory), None
    if (directory / CHECKPOINT).exists():
        checkpoint = load_checkpoint(directory / CHECKPOINT)
        config = RunConfig.from_dict(checkpoint["config"])
    finished = len(checkpoint["history"]) if checkpoint else 0
    config = dataclasses.replace(
        config, epochs=epochs or config.epochs, device=device or config.device
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
                f"{directory} is finished: {finished} of {finished} epochs. "
                "To train on, give a larger --epochs.",
                highlight=False,
                soft_wrap=True,
            )
            return summary
    data = _load(config)
    state = new_state(config, data, _device(config.device))
    if checkpoint is not None:
        try:
            state.model.load_state_dict(checkpoint["model"])
            state.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--resume: {directory / CHECKPOINT} does not fit the model {config.model!r} which "
                f"its configuration describes: {str(error).splitlines()[0]} "
                "Accepted: a folder written by dst-kernels train."
            ) from error
        state.history, state.seconds = checkpoint["history"], checkpoint["seconds"]
    return _run(config, directory, data, state, console, root)


def _run(
    config: RunConfig, directory: Path, data: Data, state: State, console: Console, root: Path
) -> dict[str, Any]:
    """Train, then write the results; `root` is what --resume takes after an interrupt."""

    def save(state: State) -> None:
        contents = {
            "config": config.to_dict(),
            "history": state.history,
            "seconds": state.seconds,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
        }
        save_checkpoint(directory / CHECKPOINT, contents)
        write_metrics(directory, state.history)

    try:
        write_json(directory / CONFIG, config.to_dict())
        device = _device_name(_device(config.device))
        display.show_header(console, config, _count(state.model.parameters()), directory, device)
        shapes = _shapes(state)
        with display.watch(console, config, state.history, len(data.train), shapes) as observer:
            train(state, config, data, observer, save)
        return _finish(config, directory, data, state, console)
    except KeyboardInterrupt:
        finished = 0
        if (directory / CHECKPOINT).exists():
            history = load_checkpoint(directory / CHECKPOINT)["history"]
            write_metrics(directory, history)
            finished = len(history)
        raise Interrupted(root, finished, config.epochs) from None


def _finish(
    config: RunConfig, directory: Path, data: Data, state: State, console: Console
) -> dict[str, Any]:
    """Write the model, the plots and, last of all, the summary: it marks a finished run."""
    from safetensors.torch import save

    from . import plots

    report = None if config.dense else dst_kernels.sparsity_report(state.model)
    last = state.history[-1]
    tensors = {name: value.cpu().contiguous() for name, value in state.model.state_dict().items()}
    write_metrics(directory, state.history)
    write_atomically(directory / MODEL, lambda file: file.write(save(tensors)))

    title = f"{config.model} on {config.dataset}"
    title += ", dense" if config.dense else f", alpha {config.alpha:g}"
    title += f", seed {config.seed}"
    plots.plot_accuracy_and_ratio(directory / "accuracy_and_ratio.png", state.history, title)
    thresholds = _thresholds(state)
    if report is not None:
        plots.plot_layer_ratios(directory / "layer_ratios.png", state.history, title)
        plots.plot_thresholds(directory / "thresholds.png", thresholds, title)

    layers = report.layers if report else []
    summary = {
        "test_accuracy": last["test_accuracy"],
        "remaining_ratio": last["remaining_ratio"],
        "test_loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "epochs": last["epoch"],
        "seconds": round(state.seconds, 3),
        "seed": config.seed,
        "preset": config.preset,
        "model": config.model,
        "dataset": config.dataset,
        "dense": config.dense,
        "alpha": config.alpha,
        "layers": last["layers"],
        "masked_weights": sum(layer.total for layer in layers),
        "kept_weights": sum(layer.kept for layer in layers),
        "thresholds": sum(values.size for values in thresholds.values()),
        "parameters": _count(state.model.parameters()),
        "input_shape": list(data.shape),
        "classes": data.classes,
        "device": _device_name(_device(config.device)),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    write_json(directory / SUMMARY, summary)
    display.show_result(console, summary, report, directory)
    return summary


def _finish_comparison(directory: Path, console: Console) -> dict[str, Any]:
    from . import plots

    dense, sparse = (read_summary(directory / name) for name in TWINS)
    comparison = {
        "accuracy_difference": sparse["test_accuracy"] - dense["test_accuracy"],
        "dense": dense,
        "sparse": sparse,
    }
    write_json(directory / COMPARISON, comparison)
    curves = [plots.Curve(name, read_metrics(directory / name), name == "dense") for name in TWINS]
    title = f"{sparse['model']} on {sparse['dataset']}, alpha {sparse['alpha']:g}"
    plots.plot_runs(directory / "comparison.png", curves, title)
    display.show_comparison(console, dense, sparse, directory)
    return comparison


def _load(config: RunConfig, download: bool = False) -> Data:
    # The model's name first: it is checked in no time, the data may have to be fetched.
    channels = input_channels(config.model)
    return load_data(config, _device(config.device), channels, download)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = "Accepted: auto, cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is unknown. {accepted}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported. {accepted}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name!r}: torch finds no such device here. {accepted}")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _refuse_old_run(out: Path | None) -> None:
    if out is not None and holds_run(out):
        raise UsageError(
            f"--out {str(out)!r} already holds a run, which would be overwritten. {_FOLDER} "
            f"To go on with the old run: --resume {out}"
        )


def _new_directory(preset: str, out: Path | None) -> Path:
    """Make the run's directory; a default name that is taken gets a number."""
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


def _shapes(state: State) -> dict[str, str]:
    parameters = dict(state.model.named_parameters())
    return {
        name: display.shape_text(tuple(parameters[f"{name}.weight"].shape))
        for name in _threshold_parameters(state)
    }


def _thresholds(state: State) -> dict[str, Any]:
    return {
        name: threshold.detach().float().cpu().numpy().ravel()
        for name, threshold in _threshold_parameters(state).items()
    }


def _threshold_parameters(state: State) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".threshold"): parameter
        for name, parameter in state.model.named_parameters()
        if name.endswith(".threshold")
    }


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("dst_kernels", "torchvision", "numpy", "scikit-learn", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
