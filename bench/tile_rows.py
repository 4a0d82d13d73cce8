"""tiles.csv: one tile of one product of one case a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .csv_rows import RowsFile, read_rows

__all__ = ["TileRow", "TilesFile", "read_tiles"]

_COMMAND = "tune"
YES, NO = "yes", "no"


@dataclass(frozen=True)
class TileRow:
    """One row; all as text, as in the file.

    `tile` without its split; `chosen`: whether it is what the library takes. Where the tile failed
    or computes something else, `reason` says so, and there are no seconds.
    """

    case: str
    dtype: str
    product: str
    tile: str
    split: str
    chosen: str
    seconds: str
    spread: str
    reason: str
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def figure(self) -> float | None:
        """The seconds; None where there is a reason for none."""
        if self.chosen not in (YES, NO):
            raise ValueError(f"chosen is {self.chosen!r}, not {YES} or {NO}")
        int(self.split)
        return None if self.reason else float(self.seconds)

    @property
    def is_chosen(self) -> bool:
        return self.chosen == YES

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What was measured."""
        return self.case, self.product, self.tile, self.split


class TilesFile(RowsFile[TileRow]):
    """Appends rows to a tiles.csv; a context manager.

    Raises UsageError where `path` holds something with another header.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, TileRow, _COMMAND)


def read_tiles(path: Path) -> list[TileRow]:
    """All complete rows. Raises UsageError where the file cannot be read or is none."""
    return read_rows(path, TileRow, _COMMAND)
