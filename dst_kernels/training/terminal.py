"""Talk to the terminal: messages, consoles, and paths that the user gives."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from . import processes
from .errors import UsageError

_WIDTH_OF_A_PIPE = 120  # columns; rich's default of 80 is too narrow for the tables


def new_console() -> Console:
    """Return a console for stdout that is wide enough for tables where that is no terminal.

    Of several processes only the first one prints.
    """
    console = Console(emoji=False, quiet=processes.rank() > 0)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_PIPE
    return console


@contextmanager
def messages() -> Iterator[None]:
    """Show warnings, and errors that a user can correct, as messages; end errors with a code.

    Of several processes only the first one shows warnings, and errors from before they joined,
    which all of them meet.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

    def warn(message: Warning | str, *where: object) -> None:
        if processes.rank() == 0:
            console.print(f"[bold yellow]Warning:[/] {escape(str(message))}")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # type: ignore[assignment]
            yield
    except UsageError as error:
        rank = processes.rank()
        if rank and not processes.joined():
            processes.leave_word_to_first(error.exit_code)
        which = f" in process {rank}" if rank else ""
        console.print(f"[bold red]Error{which}:[/] {escape(str(error))}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        if processes.rank() == 0:
            console.print(escape(str(interrupt) or "Interrupted."))
        sys.stdout.flush()
        raise typer.Exit(130) from None


def usable_path(argument: str, text: str) -> Path:
    """Return the path that an argument gives; raise UsageError if it cannot be used."""
    path, problem = Path(text), None
    try:
        text.encode()  # a command that we print must name it
        if not text.strip():
            problem = "it is blank (a variable that is not set?)"
        elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            problem = "you may not read it"
    except UnicodeEncodeError:
        problem = "it is no text"
    except OSError as error:
        problem = str(error.strerror)
    if problem is not None:
        raise UsageError(
            f"{argument} is {text!r:.80}: {problem}. Accepted: the path of a file or folder."
        )
    return path
