"""Start the `dst-kernels` command."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_EXTRA = ("matplotlib", "rich", "safetensors", "sklearn", "torchvision", "typer")


def main() -> None:
    """Run the command line; without the training extra, say what to install and exit with 2."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(
            f"Error: dst-kernels needs {', '.join(missing)}, not installed here. "
            "Install the training extra: pip install 'dst_kernels[train]'",
            file=sys.stderr,
        )
        sys.exit(2)

    from .commands import app

    app()
