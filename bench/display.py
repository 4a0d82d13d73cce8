"""What a run shows while it works."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Display"]


class Display:
    """A progress bar over lines of text; a context manager around the work."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=console or Console(), transient=True)
        self._task = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, total: int) -> None:
        self._task = self._progress.add_task("", total=total)

    def now(self, text: str) -> None:
        """What is being measured."""
        if self._task is not None:
            self._progress.update(self._task, description=escape(text))

    def advance(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)
