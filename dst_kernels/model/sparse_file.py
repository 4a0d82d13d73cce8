"""Write and read the file of a sparse model; `save.py` and `load.py` have the model's side.

It is a safetensors file. Of each weight that is mostly zeros it has what is kept and where
(`encoding.py`); every other tensor is as it is. Its header has, as JSON under one name:

* `version`: of this format;
* `weights`: for each encoded or masked weight its `encoding`, its `shape` unless that is plain,
  `threshold`, the name of its threshold, and `fixed`, true where the positions are a fixed mask;
* `same`: names of tensors that are another one of the file, with the name of that one;
* `layers`: what rebuilds a layer that `finalize_` has exchanged or shrunk (`rebuild.py`);
* `notes`: what the caller adds;
* `sha256`: of all of this and of all tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .encoding import PARTS, PLAIN, decode

_KEY, _VERSION = "dst_kernels", 1
_FORM = {"version": int, "weights": dict, "same": dict, "layers": dict, "notes": dict}
_ENTRY = {"encoding", "shape", "threshold", "fixed"}
_MOST_DIMENSIONS = 64  # torch's own limit
_FOREIGN = f"its header has no {_KEY!r}. Accepted: a file that dst_kernels.save_sparse wrote"


class SparseFileError(ValueError):
    """Report a file that `load_sparse` cannot use: its name, the entry in question and why."""

    def __init__(self, path: Path, entry: str, reason: str) -> None:
        super().__init__(f"{path}: {entry + ': ' if entry else ''}{reason}")


@dataclass
class SparseFile:
    """Hold what is in a file, on the CPU.

    Attributes:
        tensors: the dense state dict, weights as W * M, without thresholds and fixed masks.
        thresholds, masks: the threshold and the fixed mask of masked weights, by the weight's name.
        layers, notes: as in the header.
    """

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def error(self, entry: str, reason: str) -> SparseFileError:
        return SparseFileError(self.path, entry, reason)


def write_sparse(file: str | os.PathLike[str], stored: Mapping[str, Tensor], header: Any) -> None:
    """Write these tensors and this header, which lacks `version` and `sha256`.

    The file is written whole under another name, then renamed. Raises TypeError if the header is no
    JSON, OSError if the file cannot be written; a file that was there is then as before.
    """
    from safetensors.torch import save

    header = json.loads(json.dumps({"version": _VERSION, **header}))
    header["sha256"] = _digest(header, stored)
    data = save(dict(stored), {_KEY: json.dumps(header)})
    write_atomically(Path(file), lambda out: out.write(data))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file of this process beside `path`, then rename it to `path`.

    At any time `path` holds either its old or its new contents, completely.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name is only safe with its folder; not everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_sparse(file: str | os.PathLike[str]) -> SparseFile:
    """Return what is in a file of `save_sparse`.

    Raises `SparseFileError` for any other file, and for one that is damaged; OSError if it cannot
    be read.
    """
    from safetensors.torch import load

    path = Path(file)
    data = path.read_bytes()
    try:
        stored = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    except Exception as error:  # a damaged file raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparseFileError(path, "", f"no whole safetensors file ({reason:.200})") from error
    found = SparseFile(path)
    header = _header(found, metadata)
    found.layers, found.notes = header["layers"], header["notes"]
    if header["sha256"] != _digest(header, stored):
        raise found.error("", "it is damaged: its checksum is not that of its contents")
    kept: dict[str, Tensor] = {}
    for key, entry in header["weights"].items():
        _check_entry(found, key, entry)
        if entry["encoding"] == PLAIN:
            continue
        names = {name: f"{key}:{name}" for name in PARTS[entry["encoding"]]}
        absent = {key, *names.values()} - stored.keys()
        if absent:
            raise found.error(key, f"the file has no tensor {min(absent)!r}")
        values, parts = stored.pop(key), {name: stored.pop(each) for name, each in names.items()}
        try:
            tensor, kept[key] = decode(entry["encoding"], values, parts, entry["shape"])
        except (ValueError, RuntimeError) as error:  # torch's, where memory is short
            raise found.error(key, str(error)) from error
        found.tensors[key] = tensor
    return _named(found, header, stored, kept)


def _header(found: SparseFile, metadata: Any) -> dict[str, Any]:
    """Return the header; raise SparseFileError unless it has its form."""
    try:
        header = json.loads(metadata[_KEY])
    except (KeyError, TypeError):
        raise found.error("", _FOREIGN) from None
    except (ValueError, RecursionError) as error:
        raise found.error(_KEY, f"its header is no JSON ({error})") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != _VERSION:
        raise found.error("version", f"it is {version!r:.80}. Accepted: {_VERSION}")
    if header.keys() != {*_FORM, "sha256"}:
        raise found.error("", f"its header has {sorted(header)!r:.200}")
    for name, form in _FORM.items():
        if not isinstance(header[name], form):
            raise found.error(name, f"it is {header[name]!r:.80}. Accepted: a JSON object")
    return header


def _check_entry(found: SparseFile, key: str, entry: Any) -> None:
    """Raise SparseFileError unless this entry of `weights` has its form."""
    is_object = isinstance(entry, dict) and entry.keys() <= _ENTRY
    encoding = entry.get("encoding") if is_object else None
    if not isinstance(encoding, str) or encoding not in PARTS:
        raise found.error(key, f"its entry {entry!r:.80} has no known encoding")
    shape = entry.get("shape", [])
    if ("shape" in entry) == (encoding == PLAIN) or not (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**63 for size in shape)
    ):
        raise found.error(key, f"its shape {shape!r:.80} is none of the encoding {encoding}")
    threshold, fixed = entry.get("threshold", ""), entry.get("fixed", False)
    if not isinstance(threshold, str) or not isinstance(fixed, bool):
        raise found.error(key, f"its threshold is {threshold!r:.80}, fixed {fixed!r:.80}")
    if fixed and not (encoding != PLAIN and threshold):
        raise found.error(key, "its mask is fixed, but it has no positions or no threshold")


def _named(
    found: SparseFile, header: dict[str, Any], stored: dict[str, Tensor], kept: dict[str, Tensor]
) -> SparseFile:
    """Give every tensor, threshold and mask its names."""
    found.tensors |= stored
    of_masks = set()
    for key, entry in header["weights"].items():
        if key not in found.tensors:
            raise found.error(key, "the file has no such tensor")
        name = entry.get("threshold")
        if name is not None:
            if name not in found.tensors:
                raise found.error(key, f"the file has no threshold {name!r:.80}")
            of_masks.add(name)
            found.thresholds[key] = found.tensors[name]
        if entry.get("fixed"):
            found.masks[key] = kept[key]
    for name in of_masks:
        del found.tensors[name]
    for key, name in header["same"].items():
        if not isinstance(name, str) or name not in found.tensors or key in found.tensors:
            raise found.error(key, f"it is said to be the tensor {name!r:.80}")
        for named in (found.tensors, found.thresholds, found.masks):
            if name in named:
                named[key] = named[name]
    # The library returns tensors in no fixed order; errors shall be the same each time.
    found.tensors = dict(sorted(found.tensors.items()))
    return found


def _digest(header: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header, but its own, and of tensors with names, dtypes, shapes."""
    plain = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
