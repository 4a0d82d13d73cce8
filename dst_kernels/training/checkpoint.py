"""Write files completely or not at all, and read and write a run's checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import UsageError

CHECKPOINT = "checkpoint.pt"
_FORMAT = "dst_kernels.training/1"
_CONTENTS = {"format", "config", "history", "seconds", "model", "optimizer", "rng"}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it to `path`.

    At any time `path` holds either its old or its new contents, completely. Raises UsageError if
    the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Accepted: an --out folder on a disk with space, where you may write."
        ) from error


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint; `contents` are plain values and state dicts.

    Raises ValueError for missing or unknown entries, UsageError if the file cannot be written.
    """
    whole = {"format": _FORMAT, **contents}
    if set(whole) != _CONTENTS:
        raise ValueError(f"a checkpoint holds {sorted(_CONTENTS)}, but got {sorted(whole)}")
    write_atomically(path, lambda file: torch.save(whole, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors and plain values are unpickled, so an untrusted file cannot run code. Raises
    UsageError if the file is damaged or was not written by `dst-kernels train`.
    """
    accepted = "Accepted: a folder written by dst-kernels train."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says the same
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise many types
        raise UsageError(
            f"--resume: {path} is damaged or not a checkpoint ({type(error).__name__}). {accepted}"
        ) from error
    if not isinstance(contents, dict) or "format" not in contents:
        raise UsageError(f"--resume: {path} is not a checkpoint of dst-kernels train. {accepted}")
    if contents["format"] != _FORMAT or set(contents) != _CONTENTS:
        raise UsageError(
            f"--resume: {path} has the format {contents['format']!r}. "
            f"Accepted: {_FORMAT!r}, which this version of dst_kernels writes."
        )
    return contents
