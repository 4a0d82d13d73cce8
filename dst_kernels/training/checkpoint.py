"""Read and write a run's checkpoint: what torch.save writes, and behind it a checksum."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from .errors import UsageError
from .files import SECONDS, check_history, write_atomically
from .rules import Form, Rule, check
from .tasks import task_of

_FORMAT = "dst_kernels.training/2"
_UNCHECKED_FORMAT = "dst_kernels.training/1"  # the same contents, without a checksum
_SEAL = b"\nsha256:"  # then the digest of all bytes before: the end of the file
_SEAL_SIZE = len(_SEAL) + hashlib.sha256().digest_size
_ACCEPTED = "Accepted: a folder written by dst-kernels train."


def _is_generator_state(value: Any) -> bool:
    try:
        torch.Generator().set_state(value)
        return True
    except (RuntimeError, TypeError):
        return False


_MAPPING = Rule("a mapping", lambda value: isinstance(value, dict))
_CONTENTS: dict[str, Form] = {
    "format": Rule(
        _FORMAT, lambda value: isinstance(value, str) and value in (_FORMAT, _UNCHECKED_FORMAT)
    ),
    "config": _MAPPING,
    "history": Rule("a list of epochs", lambda value: isinstance(value, list) and value != []),
    "seconds": SECONDS,
    "model": _MAPPING,
    "best": _MAPPING,
    "controller": _MAPPING,
    "restore": _MAPPING,
    "method": _MAPPING,
    "ever": _MAPPING,
    "optimizer": {"state": _MAPPING, "param_groups": Rule("a list", lambda v: isinstance(v, list))},
    "rng": _MAPPING,
}
_GPU_GENERATOR = Rule(
    "the state of a generator on a GPU",
    lambda value: isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1,
)
_RNG = {
    "cpu": Rule("the state of a generator of torch", _is_generator_state),
    **dict.fromkeys(("cuda", "xpu", "mps"), _GPU_GENERATOR),
}


class _Hashed:
    """Write to a file, and hash what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint; `contents` are plain values and state dicts.

    Raises ValueError for missing or unknown entries, UsageError if the file cannot be written.
    """
    whole = {**contents, "format": _FORMAT}
    if set(whole) != set(_CONTENTS):
        raise ValueError(f"a checkpoint holds {sorted(_CONTENTS)}, but got {sorted(whole)}")

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        try:
            torch.save(whole, cast(BinaryIO, hashed))
        except RuntimeError as error:  # torch puts its own before a full disk's, or Ctrl-C
            raise error.__context__ or error from None
        file.write(_SEAL + hashed.hash.digest())

    write_atomically(path, write)


def load_checkpoint(path: Path, argument: str = "--resume") -> dict[str, Any]:
    """Read a checkpoint onto the CPU; `argument` is what named its folder, for messages.

    Only tensors and plain values are unpickled, so an untrusted file cannot run code. Warns of a
    checkpoint of an earlier version, which has no checksum. Raises UsageError if the file is
    damaged, was not written by `dst-kernels train` or has contents that training never makes.
    """
    damaged = f"{argument}: {path} is damaged or not a checkpoint"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{argument}: {path} cannot be read: {error.strerror}. {_ACCEPTED}"
        ) from error
    seal, sealed = data[-_SEAL_SIZE:], memoryview(data)[:-_SEAL_SIZE]
    has_checksum = seal.startswith(_SEAL)
    if has_checksum and seal[len(_SEAL) :] != hashlib.sha256(sealed).digest():
        raise UsageError(f"{damaged} (its checksum is not that of its contents). {_ACCEPTED}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says the same
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise many types
        raise UsageError(f"{damaged} ({type(error).__name__}). {_ACCEPTED}") from error
    if not isinstance(contents, dict) or "format" not in contents:
        raise UsageError(
            f"{argument}: {path} is not a checkpoint of dst-kernels train. {_ACCEPTED}"
        )
    # Which earlier versions did not write.
    for later in ("best", "controller", "restore", "method", "ever"):
        contents.setdefault(later, {})
    check(f"{argument}: {path}:", contents, _CONTENTS)
    if contents["format"] == _FORMAT and not has_checksum:
        raise UsageError(f"{damaged} (its checksum is missing). {_ACCEPTED}")
    task = task_of(contents["config"].get("dataset"))
    check_history(f"{argument}: {path}:", contents["history"], task)
    rng = contents["rng"]
    expected = {kind: rule for kind, rule in _RNG.items() if kind in ("cpu", *rng)}
    check(f"{argument}: {path}: rng", rng, expected)
    if contents["format"] == _UNCHECKED_FORMAT:
        warnings.warn(
            f"{path} is from an earlier version, without a checksum: "
            "whether it is damaged was not checked",
            stacklevel=2,
        )
    return contents
