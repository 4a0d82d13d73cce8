"""`python -m bench`."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    extra = ("matplotlib", "rich", "torchvision", "typer")
    missing = [name for name in extra if find_spec(name) is None]
    if missing:
        sys.exit(
            f"Error: python -m bench needs {', '.join(missing)}, not installed here. "
            "Install the bench extra: pip install -e '.[bench]'"
        )
    from .commands import app

    app()
