"""Keep other processes from writing into a run's folder."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError
from .files import LOCK, cannot_write, is_leftover
from .processes import from_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(*directories: Path) -> Iterator[None]:
    """Hold the folders for this process; remove temporary files that killed runs left there.

    Of several processes that train together the first one holds them. The system ends the lock with
    the process, however that ends. Warns where it has no locks. Raises UsageError if another
    process holds a folder, or if it cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            for directory in directories:
                stack.enter_context(_lock(directory))
                for path in directory.iterdir():
                    if path.suffix == ".tmp" and is_leftover(path):
                        path.unlink(missing_ok=True)

        from_first(hold)
        yield


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    path = directory / LOCK
    while True:
        try:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closing it ends the lock)
        except OSError as error:
            raise cannot_write(path, error) from error
        with file:
            try:
                if fcntl is None:
                    raise OSError("this system has no fcntl")
                # Unlike flock, this is not inherited by the processes that read images.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise UsageError(
                    f"{directory} is in use: {holder} writes there. "
                    "Accepted: another folder, or this one when that process has ended."
                ) from error
            except OSError as error:
                warnings.warn(
                    f"{directory} cannot be locked ({error.strerror or error}): "
                    "let no other process write there",
                    stacklevel=2,
                )
            # Whoever held it until now may have removed the file that we opened.
            try:
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue
            except FileNotFoundError:
                continue
            with contextlib.suppress(OSError):  # for others to read; a full disk is no matter
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
