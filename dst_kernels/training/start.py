"""Start runs and comparisons in new directories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from . import processes
from .config import RunConfig
from .device import select_device
from .errors import UsageError
from .files import (
    CONFIG,
    TWINS,
    holds_run,
    is_leftover,
    read_config,
    write_json,
)
from .lock import locked
from .processes import from_first
from .resume import resume, runs_in
from .run import load, resumable, resume_command, run, show_comparison, twins_of, write_twins
from .state import check_masks, new_state
from .tracking import require_tracker

_FOLDER = "Accepted: a new or empty folder where you may write."


def start(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train one model into a new directory and return its summary; raises UsageError."""
    if from_first(lambda: _is_restart(out, {".": config})) and out is not None:
        return resume(out, console)
    require_tracker(config)
    data = load(config, download)
    state = new_state(config, data, select_device(config.device))
    check_masks(state, config, data)
    # All input is checked by now, so that wrong input leaves no directory behind.
    directory = from_first(lambda: _new_directory(config.preset, out))
    with locked(directory):
        from_first(lambda: _refuse_used(directory))  # another process may have been here since
        with resumable(directory, directory, config.epochs):
            from_first(lambda: write_json(directory / CONFIG, config.to_dict()))
        return run(config, directory, data, state, console, directory)


def compare(
    config: RunConfig, out: Path | None, console: Console, *, download: bool = False
) -> dict[str, Any]:
    """Train the dense twin and the sparse model into a new directory; return the comparison."""
    configs = twins_of(config)
    if from_first(lambda: _is_restart(out, configs)) and out is not None:
        return resume(out, console)
    require_tracker(config)
    data = load(config, download)
    device = select_device(config.device)
    states = {name: new_state(twin, data, device) for name, twin in configs.items()}
    check_masks(states["sparse"], configs["sparse"], data)
    directory = from_first(lambda: _new_directory(config.preset, out))
    with locked(directory):
        from_first(lambda: _refuse_used(directory))
        with resumable(directory, directory / TWINS[0], config.epochs):
            from_first(lambda: write_twins(directory, configs))
        with locked(*(directory / name for name in TWINS)):
            dense, sparse = (
                run(twin, directory / name, data, states[name], console, directory)
                for name, twin in configs.items()
            )
            return show_comparison(directory, dense, sparse, console)


def _is_restart(out: Path | None, configs: Mapping[str, RunConfig]) -> bool:
    """Return whether a launcher repeats the command that began the runs in the folder.

    It does so after a crash. Raises UsageError if the folder has anything else.
    """
    if processes.launched():
        if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UsageError(
                "--out is not given, so that a restarted run would begin anew. Accepted: a folder, "
                "or a launcher without restarts."
            )
        if out is not None and holds_run(out):
            begun = {name: read_config(out / name) for name in runs_in(out)}
            if begun == {name: configs.get(name) for name in begun}:
                return True
    _refuse_used(out)
    return False


def _refuse_used(out: Path | None) -> None:
    """Raise UsageError if the folder has anything in it but what a killed start leaves."""
    try:
        names = sorted(path.name for path in out.iterdir() if not is_leftover(path)) if out else []
    except (FileNotFoundError, NotADirectoryError):
        return  # it can be made, or the error comes with that
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be read: {error.strerror}. {_FOLDER}"
        ) from error
    if out is None or not names:
        return
    if holds_run(out):
        raise UsageError(
            f"--out {str(out)!r} already holds a run, which would be overwritten. {_FOLDER} "
            f"To go on with the old run:\n  {resume_command(out)}"
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UsageError(
        f"--out {str(out)!r} is not empty: it has {', '.join(map(repr, names[:3]))}{more}. "
        f"{_FOLDER}"
    )


def _new_directory(preset: str, out: Path | None) -> Path:
    """Make and return the run's directory; a default name that exists gets a number."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        name, number = f"runs/{preset}-{datetime.now():%Y%m%d-%H%M%S}", 1
        while True:
            directory = Path(name if number == 1 else f"{name}-{number}")
            try:
                directory.mkdir(parents=True)
                return directory
            except FileExistsError:
                if not directory.is_dir():
                    raise
            number += 1
    except OSError as error:
        raise UsageError(
            f"--out {str(out or 'runs')!r} cannot be made: {error.strerror}. {_FOLDER}"
        ) from error
