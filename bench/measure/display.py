"""What a run shows while it works: a table that grows, over progress with the time left."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..measurements import duration


class Display:
    """Prints a line for each figure, and on a terminal a progress bar below; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        text = TextColumn("left · {task.description}")
        self._progress = Progress(*columns, text, console=console or Console(), transient=True)
        self._task = self._progress.add_task("", total=None)
        self.advance = lambda: self._progress.advance(self._task)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, total: int) -> None:
        """Start to count to `total`."""
        self._progress.reset(self._task, total=total, description="")

    def now(self, text: str) -> None:
        """Say what is being measured."""
        self._progress.update(self._task, description=escape(text))

    def figure(self, case: str, contender: str, pass_name: str, seconds: float, over: str) -> None:
        """Show a time, and it over that of dense as text."""
        cells = f"{case:<44} {contender:<20} {pass_name:<16} {duration(seconds):>8}"
        self.say(f"{cells} {over and over + ' ÷ dense':>14}".rstrip())

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)
