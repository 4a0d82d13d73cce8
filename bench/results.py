"""results.csv: one figure a row, flushed row by row, so that a cut-off run keeps what it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .cases import AnyCase
from .csv_rows import RowsFile, columns, read_rows
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


COLUMNS = columns(Row)
_COMMAND = "run"


class ResultsFile(RowsFile[Row]):
    """Appends rows to a CSV; a context manager.

    Raises UsageError where `path` holds something with another header.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row, _COMMAND)


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
        # Bytes and launches are exact: a goal may compare them with what is allowed to the last.
        text = str(value) if isinstance(value, (str, int)) else f"{value:.6g}"
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
    return read_rows(path, Row, _COMMAND)


def read_all(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files. Raises UsageError where there are none at all."""
    rows = [row for path in paths for row in read_results(path)]
    if not rows:
        raise UsageError(f"no figures in {', '.join(map(str, paths))}. Accepted: a run's results.")
    return rows
