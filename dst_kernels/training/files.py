"""Name the files of a run directory, and read and write them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import CHECKPOINT, write_atomically
from .config import RunConfig
from .errors import UsageError

CONFIG = "config.json"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
MODEL = "model.safetensors"
COMPARISON = "comparison.json"
TWINS = ("dense", "sparse")

Record = dict[str, Any]
"""One finished epoch: `epoch`, the columns below, and `layers`, a ratio for each layer's name."""

_COLUMNS = ("lr", "train_loss", "test_loss", "test_accuracy", "remaining_ratio")
_LAYER = "remaining_ratio/"


def holds_run(directory: Path) -> bool:
    """Return whether a run (or a comparison) has written into the directory before."""
    names = (CONFIG, METRICS, SUMMARY, MODEL, CHECKPOINT, COMPARISON, *TWINS)
    return any((directory / name).exists() for name in names)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as indented JSON."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_metrics(directory: Path, history: Sequence[Record]) -> None:
    """Write metrics.csv from the whole history; floats keep their exact values."""
    text = io.StringIO()
    layers = list(history[0]["layers"]) if history else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *_COLUMNS, *(_LAYER + name for name in layers)])
    for record in history:
        ratios = [record["layers"][name] for name in layers]
        writer.writerow([record["epoch"], *(record[name] for name in _COLUMNS), *ratios])
    write_atomically(directory / METRICS, lambda file: file.write(text.getvalue().encode()))


def read_metrics(directory: Path) -> list[Record]:
    """Return the history that `write_metrics` wrote; raise UsageError if it is unreadable."""
    path = directory / METRICS
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                {
                    "epoch": int(row.pop("epoch")),
                    **{name: float(row.pop(name)) for name in _COLUMNS},
                    "layers": {key.removeprefix(_LAYER): float(row[key]) for key in row},
                }
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_config(directory: Path) -> RunConfig:
    """Return the configuration in config.json; raise UsageError if it is unreadable."""
    values = _read_json(directory / CONFIG)
    try:
        return RunConfig.from_dict(values)
    except UsageError as error:
        raise UsageError(f"{directory / CONFIG}: {error}") from error


def read_summary(directory: Path) -> dict[str, Any]:
    """Return the contents of summary.json; raise UsageError if it is unreadable."""
    return _read_json(directory / SUMMARY)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UsageError(
        f"{path} cannot be read: {reason}. Accepted: a folder written by dst-kernels train."
    )
