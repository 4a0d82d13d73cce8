"""The entry point of `python -m bench`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

_EXTRA = ("matplotlib", "rich", "typer")


def main() -> None:
    """Run the command line; says what to install where the bench extra is missing."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(
            f"Error: python -m bench needs {', '.join(missing)}, not installed here. "
            "Install the bench extra: pip install -e '.[bench]'",
            file=sys.stderr,
        )
        sys.exit(2)

    from .commands import app

    app()
