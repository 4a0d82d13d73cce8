"""Name the files of a run directory, and read and write them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..model.sparse_file import write_atomically as write_whole
from .config import RunConfig
from .errors import UsageError
from .masks import COLUMNS
from .rules import FLAG, TEXT, Form, Rule, check, integer, number, or_none
from .tasks import CLASSIFICATION, LANGUAGE, Task, task_of

CONFIG = "config.json"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
MODEL = "model.safetensors"
BEST = "best.safetensors"  # of the epoch with the lowest loss on what --validation holds out
CHECKPOINT = "checkpoint.pt"
LOG = "train.log"  # only added to
TRACKED = "tensorboard"  # a folder of events, only added to
VOCABULARY = "vocabulary.json"  # the characters of a text in the order of their ids
PLOT_OF_LAYERS, PLOT_OF_THRESHOLDS = "layer_ratios.png", "thresholds.png"
PLOT_OF_MASKS = "masks.png"
SUMS = "SHA256SUMS"
COMPARISON = "comparison.json"
PLOT_OF_COMPARISON = "comparison.png"
LOCK = ".dst-kernels.lock"
TWINS = ("dense", "sparse")

_PLOTS = (CLASSIFICATION.plot, LANGUAGE.plot, PLOT_OF_LAYERS, PLOT_OF_THRESHOLDS, PLOT_OF_MASKS)
_RESULTS = (CONFIG, VOCABULARY, METRICS, MODEL, BEST, *_PLOTS, SUMMARY)
_FILES = (*_RESULTS, CHECKPOINT, SUMS, COMPARISON, PLOT_OF_COMPARISON)
_ACCEPTED = "Accepted: a folder written by dst-kernels train"

Record = dict[str, Any]
"""One finished epoch: `epoch`, the columns below, and `layers`, a ratio for each layer's name."""

_LAYER = "remaining_ratio/"

SECONDS = number("a number of at least 0", lambda value: value >= 0)
_LOSS = number("a finite number", lambda value: True)
_SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_COUNT = integer(0)
_SHARES = Rule(
    "a number from 0 to 1 for each layer's name",
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(name, str) and _SHARE.holds(share) for name, share in value.items())
    ),
)
_RECORD = {
    "epoch": integer(1),
    "lr": SECONDS,
    "train_loss": _LOSS,
    "test_loss": _LOSS,
    "remaining_ratio": _SHARE,
    "layers": _SHARES,
}
_SUMMARY = {
    "remaining_ratio": _SHARE,
    "test_loss": _LOSS,
    "train_loss": _LOSS,
    "epochs": integer(1),
    "seconds": SECONDS,
    "seed": _COUNT,
    "preset": TEXT,
    "model": TEXT,
    "dataset": TEXT,
    "dense": FLAG,
    "method": TEXT,
    "density": or_none(_SHARE),
    "alpha": SECONDS,
    "target": or_none(_SHARE),
    "layers": _SHARES,
    "best": Rule("a mapping or none", lambda value: value is None or isinstance(value, dict)),
    "execution": TEXT,
    "masked_weights": _COUNT,
    "kept_weights": _COUNT,
    "thresholds": _COUNT,
    "parameters": _COUNT,
    "classes": integer(1),
    "device": TEXT,
    "threads": _COUNT,
    "processes": integer(1),
    "fsdp": FLAG,
    "versions": Rule("versions by package", lambda value: isinstance(value, dict)),
}


def _columns(task: Task, names: Collection[str]) -> tuple[str, ...]:
    """Return the columns, with those of the validation and of masks if they are among `names`."""
    validation = ("validation_loss", task.validation_key) if "validation_loss" in names else ()
    masks = COLUMNS if COLUMNS[0] in names else ()
    quality = (*validation, "test_loss", task.key)
    return "epoch", "lr", "train_loss", *quality, "remaining_ratio", *masks


def best_record(history: Sequence[Record]) -> Record | None:
    """Return the first epoch with the lowest validation loss; None if that was not measured."""
    if not history or "validation_loss" not in history[0]:
        return None
    return min(history, key=lambda record: record["validation_loss"])


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Do what `model.sparse_file.write_atomically` does; raise UsageError if that fails."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UsageError:
    """Return the error for a file that the system does not let us write."""
    return UsageError(
        f"{path} cannot be written: {error.strerror or error}. "
        "Accepted: a folder (--out, --plot) on a disk with space, where you may write."
    )


def holds_run(directory: Path) -> bool:
    """Return whether the directory has a run, or a comparison, that can be resumed."""
    return any((directory / name / CONFIG).is_file() for name in (".", *TWINS))


def is_leftover(path: Path) -> bool:
    """Return whether a run that was killed may have left this without having written anything."""
    if path.name in TWINS and path.is_dir():
        return all(map(is_leftover, path.iterdir()))
    return path.name == LOCK or (
        path.suffix == ".tmp" and any(path.name.startswith(f".{name}.") for name in _FILES)
    )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as indented JSON."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_metrics(directory: Path, history: Sequence[Record], task: Task) -> None:
    """Write metrics.csv from the whole history; floats keep their exact values."""
    text = io.StringIO()
    layers = list(history[0]["layers"]) if history else []
    writer = csv.writer(text, lineterminator="\n")
    columns = _columns(task, history[0] if history else ())
    writer.writerow([*columns, *(_LAYER + name for name in layers)])
    for record in history:
        ratios = [record["layers"][name] for name in layers]
        writer.writerow([*(record[name] for name in columns), *ratios])
    write_atomically(directory / METRICS, lambda file: file.write(text.getvalue().encode()))


def read_metrics(directory: Path, task: Task) -> list[Record]:
    """Return the history that `write_metrics` wrote; raise UsageError if it is damaged."""
    path = directory / METRICS
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        known = list(_columns(task, header))
        layers = [name.removeprefix(_LAYER) for name in header[len(known) :]]
        if header != known + [_LAYER + name for name in layers]:
            raise ValueError(f"its first line is not {','.join(known)},{_LAYER}<layer>,...")
        history = []
        for row in rows:
            epoch, *values = row
            numbers = dict(zip(header[1:], map(float, values), strict=True))
            ratios = {name: numbers.pop(_LAYER + name) for name in layers}
            history.append({"epoch": int(epoch), **numbers, "layers": ratios})
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from error
    check_history(f"{path}:", history, task)
    return history


def check_history(name: str, history: Any, task: Task) -> None:
    """Raise UsageError unless the history is one that training makes: epochs 1, 2, 3, ..."""
    form: dict[str, Form] = {**_RECORD, task.key: task.values}
    first = history[0] if isinstance(history, list) and history else None
    if isinstance(first, dict) and "validation_loss" in first:
        form |= {"validation_loss": _LOSS, task.validation_key: task.values}
    if isinstance(first, dict) and COLUMNS[0] in first:
        form |= dict(zip(COLUMNS, (_SHARE, _SHARE, SECONDS), strict=True))
    check(f"{name} history", history, [form])
    for index, record in enumerate(history):
        where = f"{name} history[{index}]"
        check(f"{where}.epoch", record["epoch"], integer(index + 1, index + 1))
        check(f"{where}.layers", record["layers"], dict.fromkeys(history[0]["layers"], _SHARE))


def read_config(directory: Path) -> RunConfig:
    """Return the configuration in config.json; raise UsageError if it is damaged."""
    values = _read_json(directory / CONFIG)
    try:
        return RunConfig.from_dict(values)
    except UsageError as error:
        raise UsageError(f"{directory / CONFIG}: {error}") from error


def read_summary(directory: Path) -> dict[str, Any]:
    """Return the contents of summary.json; raise UsageError if it is damaged."""
    # What files mean that were written before there was an option.
    older: dict[str, Any] = {"execution": "layer by layer", "best": None, "target": None}
    older |= {"processes": 1, "fsdp": False, "method": "dst", "density": None}
    summary = {**older, **_read_json(directory / SUMMARY)}
    try:
        task = task_of(summary.get("dataset"))
        form = {**_SUMMARY, task.key: task.values, "input_shape": sizes_of(task)}
        check(f"{directory / SUMMARY}:", summary, form)
    except UsageError as error:
        raise UsageError(f"{error} {_made_again(directory)}") from error
    return summary


def sizes_of(task: Task) -> Rule:
    """Accept the shape of an input, without the batch."""
    return Rule(
        f"a list of sizes: {', '.join(task.sizes)}",
        lambda value: (
            isinstance(value, list)
            and len(value) == len(task.sizes)
            and all(integer(1).holds(size) for size in value)
        ),
    )


def keep_vocabulary(directory: Path, vocabulary: str) -> None:
    """Write vocabulary.json, unless the data has none ("").

    Raises UsageError if the file is there and has other characters.
    """
    path = directory / VOCABULARY
    if not vocabulary:
        return
    if not path.exists():
        write_json(path, {"characters": vocabulary})
    elif _read_json(path) != {"characters": vocabulary}:
        raise UsageError(
            f"{path} does not have the {len(vocabulary)} characters of the text that --data-dir "
            "names. Accepted: the text with which the run began, or a new run."
        )


def read_vocabulary(directory: Path) -> str:
    """Return the characters in vocabulary.json, "" without it; raise UsageError if damaged."""
    path = directory / VOCABULARY
    if not path.exists():
        return ""
    form = {"characters": TEXT}
    values = _read_json(path)
    check(f"{path}:", values, form)
    return values["characters"]


def checksums(directory: Path) -> str:
    """Return the SHA-256 of every result in the directory, in the format of `sha256sum -c`."""
    paths = [directory / name for name in _RESULTS if (directory / name).is_file()]
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths
    )


def is_finished(directory: Path) -> bool:
    """Return whether the results in the directory are those which a run wrote at its end."""
    try:
        return (directory / SUMS).read_bytes() == checksums(directory).encode()
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    again = "" if path.name in (CONFIG, VOCABULARY) else f" {_made_again(path.parent)}"
    return UsageError(f"{path} cannot be read: {reason}. {_ACCEPTED}.{again}")


def _made_again(directory: Path) -> str:
    command = f"dst-kernels train --resume {shlex.quote(str(directory))}"
    return f"If its checkpoint is whole, this makes the file again:\n  {command}"
