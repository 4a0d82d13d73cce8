"""Time the tiles a launcher could use for a problem, and remember the fastest, if asked to.

This is off unless DST_KERNELS_AUTOTUNE=1. Then the first call for a problem (token counts by powers
of two) times every candidate on the call's own arguments, some milliseconds each; later calls and
later processes read the answer. Nothing is timed at import or while a CUDA graph is captured.

Answers are kept in one JSON file for each GPU under DST_KERNELS_CACHE_DIR (default: the user's
cache directory), whose name also hashes the kernels' source and the versions of Triton and torch.

The benchmark chooses each tile in turn by `choosing`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import triton
from torch import Tensor

from ..device import gpu_name, variable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AUTOTUNE = "DST_KERNELS_AUTOTUNE"
CACHE_DIRECTORY = "DST_KERNELS_CACHE_DIR"

Tile = TypeVar("Tile", bound="DataclassInstance")


def tuned(
    problem: str,
    default: Tile,
    candidates: Sequence[Tile],
    run: Callable[[Tile], object],
    example: Tensor,
) -> Tile:
    """Return the fastest of `candidates` for `run`, or `default` where nothing can be timed.

    `problem` names kernel, sizes and dtypes; `example` is any tensor of the call.
    """
    if _choose is not None:
        return _choose(default, candidates, run)
    name = gpu_name(example.device)
    if name is None or torch.cuda.is_current_stream_capturing():
        return default
    file = _cache_file(name)
    if problem not in _answers(file):
        fastest = min((default, *candidates), key=lambda tile: _seconds(run, tile))
        _answers(file)[problem] = dataclasses.asdict(fastest)
        _save(file)
    return type(default)(**_answers(file)[problem])


def tuning_is_on() -> bool:
    """Return whether the environment asks for it, or `choosing` does."""
    return _choose is not None or (variable(AUTOTUNE) or "0") != "0"


_choose: Callable[[Any, Sequence[Any], Callable[[Any], object]], Any] | None = None


@contextlib.contextmanager
def choosing(
    choose: Callable[[Any, Sequence[Any], Callable[[Any], object]], Any],
) -> Iterator[None]:
    """Make launchers take the tile that `choose(default, candidates, run)` returns, inside this.

    `run(tile)` launches what the launcher is about to launch, as often as it is called.
    """
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


def token_bucket(M: int) -> int:
    """Return M rounded up to a power of two, so that batches of similar size share an answer."""
    return 1 << max(M - 1, 0).bit_length()


def _seconds(run: Callable[[Tile], object], tile: Tile) -> float:
    """Return the median time with a cold L2; infinity if the GPU cannot run the tile."""
    try:
        return triton.testing.do_bench(lambda: run(tile), return_mode="median") * 1e-3
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _cache_file(gpu: str) -> Path:
    directory: str | Path | None = os.environ.get(CACHE_DIRECTORY)
    if not directory:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(base) / "dst_kernels"
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(directory) / f"tiles-{slug}-{_fingerprint()}.json"


@functools.cache
def _fingerprint() -> str:
    """Return a hash of all that may change which tile is fastest, except the GPU."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


_known: dict[Path, dict[str, dict]] = {}


def _answers(file: Path) -> dict[str, dict]:
    """Return the answers that this process knows, by problem."""
    if file not in _known:
        _known[file] = _read(file)
    return _known[file]


def _read(file: Path) -> dict[str, dict]:
    """Return what is on disk; an unreadable file counts as empty and will be replaced."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _save(file: Path) -> None:
    """Write the answers and keep those of other processes; readers never see half a file."""
    _known[file] = {**_read(file), **_known[file]}
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w") as stream:
        json.dump(_known[file], stream, indent=1, sort_keys=True)
    os.replace(temporary, file)
