"""A CSV of one kind of row, flushed row by row, so that a cut-off run keeps what it has."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from .errors import UsageError

__all__ = ["RowsFile", "columns", "read_rows"]

Row = TypeVar("Row")
"""A dataclass of texts, with the columns' names but for a trailing underscore; its property
`figure`, a number or None, raises ValueError where a text is no number."""


class RowsFile(Generic[Row]):
    """Appends rows to a CSV; a context manager.

    Args:
        kind: of its rows.
        command: what writes such files, for the message.

    Raises UsageError where `path` holds something with another header.
    """

    def __init__(self, path: Path, kind: type[Row], command: str) -> None:
        self.path = path
        self._kind, self._command = kind, command

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = self.path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}") from error
        if text:
            _check_header(self.path, text, self._kind, self._command)
        complete = text.rfind("\n") + 1  # a run killed while writing leaves part of a row
        if complete < len(text):
            os.truncate(self.path, len(text[:complete].encode()))
        self._file = open(self.path, "a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not complete:
            self._write(columns(self._kind))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        self._write([getattr(row, field.name) for field in fields(self._kind)])

    def _write(self, values) -> None:
        self._writer.writerow(values)
        self._file.flush()


def columns(kind: type[Any]) -> tuple[str, ...]:
    """The header of a file of such rows."""
    return tuple(field.name.rstrip("_") for field in fields(kind))


def read_rows(path: Path, kind: type[Row], command: str) -> list[Row]:
    """All complete rows of a file that `command` wrote.

    Raises UsageError where it cannot be read or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    _check_header(path, text, kind, command)
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, values in enumerate(csv.reader(io.StringIO(complete)), start=1):
        if number == 1:
            continue
        try:
            if len(values) != len(columns(kind)):
                raise ValueError(f"{len(values)} values for {len(columns(kind))} columns")
            row = kind(*values)
            _ = row.figure
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def _check_header(path: Path, text: str, kind: type[Any], command: str) -> None:
    header, expected = text.split("\n", 1)[0].rstrip("\r"), ",".join(columns(kind))
    if header != expected:
        raise UsageError(
            f"{path} has the header {header[:200]!r}. Accepted: {expected!r}, as written by "
            f"python -m bench {command}; choose another folder or move the file away."
        )
