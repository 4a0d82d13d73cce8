"""results.csv: one figure a row, flushed row by row, so that a cut-off run keeps what it has."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

from .cases import AnyCase
from .environment import Environment
from .errors import UsageError

__all__ = ["COLUMNS", "ERROR", "SKIPPED", "ResultsFile", "Row", "Run", "read_all", "read_results"]

# Metrics whose value is a reason: the provider is wrong, or cannot run here. Such a provider (or,
# with a pass, such a measurement) has no figures.
ERROR = "error"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Row:
    """One row, with the columns' names but for `pass`; all as text, as in the file."""

    suite: str
    case: str
    provider: str
    pass_: str
    metric: str
    value: str
    unit: str
    M: str
    N: str
    K: str
    dtype: str
    remaining_ratio: str
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def figure(self) -> float | None:
        """The value as a number; None where it is a reason."""
        return None if self.metric in (ERROR, SKIPPED) else float(self.value)


COLUMNS = tuple(field.name.rstrip("_") for field in fields(Row))


class ResultsFile:
    """Appends rows to a CSV; a context manager.

    Raises UsageError where `path` holds something with another header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ResultsFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = self.path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}") from error
        if text:
            _check_header(self.path, text)
        complete = text.rfind("\n") + 1  # a run killed while writing leaves part of a row
        if complete < len(text):
            os.truncate(self.path, len(text[:complete].encode()))
        self._file = open(self.path, "a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not complete:
            self._write(COLUMNS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        self._write([getattr(row, field.name) for field in fields(Row)])

    def _write(self, values) -> None:
        self._writer.writerow(values)
        self._file.flush()


@dataclass(frozen=True)
class Run:
    """Turns figures into rows of a file."""

    file: ResultsFile
    environment: Environment

    def add(
        self,
        suite: str,
        case: AnyCase | str,
        provider: str,
        pass_name: str,
        metric: str,
        value: float | str,
        unit: str = "",
    ) -> None:
        """`case`: a case, or a name for what is none (then its columns stay empty)."""
        if isinstance(case, str):
            about = (case, "", "", "", "", "")
        else:
            about = (case.name, *case.sizes, case.dtype, f"{case.remaining_ratio:g}")
        name, M, N, K, dtype, ratio = about
        text = value if isinstance(value, str) else f"{value:.6g}"
        here = self.environment
        self.file.add(
            Row(
                *(suite, name, provider, pass_name, metric, text, unit),
                *(M, N, K, dtype, ratio),
                *(here.gpu, here.torch, here.triton, here.commit, here.date),
            )
        )


def read_results(path: Path) -> list[Row]:
    """All complete rows of a results.csv.

    Raises UsageError where it cannot be read or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    _check_header(path, text)
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, values in enumerate(csv.reader(io.StringIO(complete)), start=1):
        if number == 1:
            continue
        try:
            if len(values) != len(COLUMNS):
                raise ValueError(f"{len(values)} values for {len(COLUMNS)} columns")
            row = Row(*values)
            _ = row.figure
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def read_all(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files. Raises UsageError where there are none at all."""
    rows = [row for path in paths for row in read_results(path)]
    if not rows:
        raise UsageError(f"no figures in {', '.join(map(str, paths))}. Accepted: a run's results.")
    return rows


def _check_header(path: Path, text: str) -> None:
    header, expected = text.split("\n", 1)[0].rstrip("\r"), ",".join(COLUMNS)
    if header != expected:
        raise UsageError(
            f"{path} has the header {header[:200]!r}. Accepted: {expected!r}, as written by "
            "python -m bench run; choose another folder or move the file away."
        )
