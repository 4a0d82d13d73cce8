"""results.csv: one figure a row, written row by row, with where and by what it was measured."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import re
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import torch

from dst_kernels.model.sparse_file import write_atomically
from dst_kernels.training.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
CPU = "cpu"  # how the column gpu begins in rows without one

# Metrics whose value is a reason: the contender is wrong, or cannot run here. Such a contender (or,
# with a pass, such a measurement) has no figures.
ERROR, SKIPPED = "error", "skipped"

_UNKNOWN, _LONGEST_REASON = "unknown", 300
_CODE = ("dst_kernels", "csrc", "bench", ":!bench/results")  # what a figure depends on


class WrongResultError(RuntimeError):
    """A contender computes something else than the reference."""


def first_line(error: BaseException) -> str:
    """Return the error in one line of bounded length, so that one row of a CSV is one line."""
    # Where the first ends in a colon, torch.compile names the cause in the second.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    text = f"{type(error).__name__}: {said}".removesuffix(": ")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def write_whole(path: Path, write: Callable[[BinaryIO], object] | str) -> None:
    """Write a text, or what `write` puts into a file, under another name, then rename that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (lambda f: f.write(write.encode())) if isinstance(write, str) else write)


@dataclass(frozen=True)
class Environment:
    """The columns that all rows of one run share; `date` (UTC) tells runs apart."""

    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @classmethod
    def now(cls, device: torch.device, commit: str | None = None) -> Environment:
        """Describe this process; `commit` serves a copy of the code that has no git history."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        triton = importlib.metadata.version("triton") if find_spec("triton") else "none"
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(gpu, torch.__version__, triton, commit or _commit(), date)

    @property
    def known(self) -> bool:
        """Whether the commit says which code ran."""
        return self.commit != _UNKNOWN and not self.commit.endswith("-dirty")

    def made(self, row: Row) -> bool:
        """Return whether a row was measured on this device, with these versions, by this code."""
        return self.known and (row.gpu, row.torch, row.triton, row.commit) == astuple(self)[:4]


def slug(text: str) -> str:
    """Return a device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    """Return the processor's name: figures of two are never compared."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return f"{CPU}: {names[0] if names else platform.processor() or platform.machine()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return _UNKNOWN


_FIGURE = "suite case provider pass metric value unit M N K dtype remaining_ratio"
_COLUMNS = (*_FIGURE.split(), *(field.name for field in fields(Environment)))


class Row(namedtuple("Row", [name.replace("pass", "pass_") for name in _COLUMNS])):
    """One row, all as text; `provider` is the contender. A case may have no M, N or K."""

    @property
    def figure(self) -> float | None:
        """The value as a number; None where it is a reason."""
        return None if self.metric in (ERROR, SKIPPED) else float(self.value)


class ResultsFile:
    """Appends rows to a results.csv, each flushed, so that a cut-off run keeps what it has.

    It is a context manager, and raises UsageError where `path` has another header.
    """

    def __init__(self, path: Path, environment: Environment) -> None:
        self.path, self.environment = path, environment

    def __enter__(self) -> ResultsFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = _read(self.path) if self.path.exists() else ""
        complete = text.rfind("\n") + 1  # a run killed while writing leaves part of a row
        if complete < len(text):
            os.truncate(self.path, len(text[:complete].encode()))
        self._file = open(self.path, "a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not complete:
            self._write(_COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self, suite: str, case, contender: str, pass_name: str, metric: str, value, unit: str = ""
    ) -> None:
        """Append a number or text of a `cases.Case`, or of a name that is none and has no sizes."""
        name, about = case, [""] * 5
        if not isinstance(case, str):
            sizes = (getattr(case, size, "") for size in "MNK")
            name, about = case.name, (*sizes, case.dtype, f"{case.remaining_ratio:g}")
        # Bytes and launches are exact: a goal may compare them to the last digit.
        text = str(value) if isinstance(value, (str, int)) else f"{value:.6g}"
        figure = (suite, name, contender, pass_name, metric, text, unit)
        self._write((*figure, *about, *astuple(self.environment)))

    def _write(self, values: Iterable[str]) -> None:
        self._writer.writerow(values)
        self._file.flush()


def read_results(*paths: Path) -> list[Row]:
    """Return all complete rows; raises UsageError for what is no results.csv, and without rows."""
    rows = []
    for path in paths:
        text = _read(path)
        lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
        next(lines, None)  # the header
        for number, values in enumerate(lines, start=2):
            try:
                if len(values) != len(_COLUMNS):
                    raise ValueError(f"{len(values)} values for {len(_COLUMNS)} columns")
                rows.append(Row(*values))
                _ = rows[-1].figure
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise UsageError(f"no figures in {', '.join(map(str, paths))}. Accepted: a run's results.")
    return rows


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    header, expected = text.split("\n", 1)[0].rstrip("\r"), ",".join(_COLUMNS)
    if text and header != expected:
        advice = "as written by python -m bench run; choose another folder or move the file away"
        raise UsageError(
            f"{path} has the header {header[:200]!r}. Accepted: {expected!r}, {advice}."
        )
    return text
