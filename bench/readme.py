"""The README's table between its markers."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError
from .files import write_text

__all__ = ["BEGIN", "END", "has_markers", "refresh"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def has_markers(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return False
    return text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def refresh(path: Path, table: str) -> None:
    """Replace what is between the markers.

    Raises UsageError where `path` has not both, once and in order.
    """
    if not has_markers(path):
        raise UsageError(
            f"--readme is {path}. Accepted: a file with one {BEGIN} and one {END} after it."
        )
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(path, f"{before}{BEGIN}\n{table}\n{END}{after}")
