"""Write the results of a finished run: model, plots and summary."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dst_kernels
from dst_kernels.nn import MaskedModule

from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from . import plots, processes
from .config import RunConfig
from .data import Data
from .device import device_name, select_device
from .files import (
    BEST,
    COMPARISON,
    MODEL,
    PLOT_OF_COMPARISON,
    PLOT_OF_LAYERS,
    PLOT_OF_MASKS,
    PLOT_OF_THRESHOLDS,
    SUMMARY,
    SUMS,
    TWINS,
    best_record,
    checksums,
    read_config,
    read_metrics,
    write_atomically,
    write_json,
    write_metrics,
)
from .masks import COLUMNS
from .state import State
from .tasks import task_of


def write_results(
    config: RunConfig,
    directory: Path,
    data: Data,
    state: State,
    report: dst_kernels.SparsityReport | None,
) -> dict[str, Any]:
    """Write the model, plots, summary and, last, checksums, which mark the run as finished.

    Return the summary; `report` is None for a dense model.
    """
    from safetensors.torch import save

    def write_weights(name: str, weights: Mapping[str, Tensor]) -> None:
        tensors = {key: value.contiguous() for key, value in weights.items()}
        write_atomically(directory / name, lambda file: file.write(save(tensors)))

    task = config.task
    write_metrics(directory, state.history, task)
    write_weights(MODEL, state.weights)
    best = best_record(state.history)
    if best is not None:
        write_weights(BEST, state.best)

    thresholds = {
        name: threshold.float().numpy().ravel()
        for name, threshold in thresholds_by_layer(state).items()
    }
    title = f"{config.model} on {config.dataset}, {config.kind}, seed {config.seed}"
    plots.plot_quality_and_ratio(directory / task.plot, state.history, title, task)
    if report is not None:
        plots.plot_layer_ratios(
            directory / PLOT_OF_LAYERS, state.history, title, guarded=config.rival is None
        )
        if thresholds:
            plots.plot_thresholds(directory / PLOT_OF_THRESHOLDS, thresholds, title)
        if COLUMNS[0] in state.history[0]:
            plots.plot_masks(directory / PLOT_OF_MASKS, state.history, title)

    last = state.history[-1]
    summary = {
        task.key: last[task.key],
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
        "method": config.method,
        "density": config.density,
        "alpha": config.alpha,
        "target": config.target,
        "layers": last["layers"],
        "best": best,
        "execution": config.execution,
        "masked_weights": report.total if report else 0,
        "kept_weights": report.kept if report else 0,
        "thresholds": sum(values.size for values in thresholds.values()),
        "parameters": count_parameters(state.model),
        "input_shape": list(data.shape),
        "classes": data.classes,
        "device": device_name(select_device(config.device)),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "fsdp": config.fsdp,
        "versions": _versions(),
    }
    write_json(directory / SUMMARY, summary)
    sums = checksums(directory).encode()
    write_atomically(directory / SUMS, lambda file: file.write(sums))
    return summary


def write_comparison(
    directory: Path, dense: dict[str, Any], sparse: dict[str, Any]
) -> dict[str, Any]:
    """Write and return the comparison of two finished twins by their summaries, and plot it."""
    task = task_of(sparse["dataset"])
    comparison = {
        f"{task.quality}_difference": sparse[task.key] - dense[task.key],
        "dense": dense,
        "sparse": sparse,
    }
    write_json(directory / COMPARISON, comparison)
    curves = [
        plots.Curve(name, read_metrics(directory / name, task), name == "dense") for name in TWINS
    ]
    config = read_config(directory / TWINS[1])
    title = f"{config.model} on {config.dataset}, {config.kind}, seed {config.seed}"
    plots.plot_runs(directory / PLOT_OF_COMPARISON, curves, title, task)
    return comparison


def weights_by_layer(model: nn.Module) -> dict[str, MaskedWeight]:
    """Return a model's masked weights by the names in the report; {} for a dense model."""
    dense = not any(isinstance(module, MaskedModule) for module in model.modules())
    return {} if dense else dict(named_masked_weights(model))


def thresholds_by_layer(state: State) -> dict[str, Tensor]:
    """Return the last epoch's thresholds, on the CPU, by the names in the report.

    {} for a dense model, and where a method has fixed the masks: they decide nothing then.
    """
    if state.method is not None:
        return {}
    keys = {id(parameter): name for name, parameter in state.model.named_parameters()}
    parts = weights_by_layer(state.model)
    return {name: state.weights[keys[id(part.threshold)]] for name, part in parts.items()}


def count_parameters(model: nn.Module) -> int:
    """Return the number of elements in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("dst_kernels", "torchvision", "numpy", "scikit-learn", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
