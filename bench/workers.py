"""Tasks for processes of which any may die: each works on one task at a time, so that it is known
which one killed it."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .errors import first_line

__all__ = ["Finished", "run_each"]

_READY = "ready"


@dataclass(frozen=True)
class Finished:
    """A task with what went wrong, or None; `died`: with the process that it ran in."""

    task: Any
    problem: str | None
    died: bool = False


def run_each(
    function: Callable[[Any], object],
    tasks: Iterable[Any],
    jobs: int,
    deadline: float = float("inf"),
) -> Iterator[Finished]:
    """`function(task)` in up to `jobs` fresh processes; each task as it finishes.

    Begun in order. Ends at the deadline on the clock of `time.monotonic`, with what is under way.
    Raises RuntimeError where a process dies before its first task.
    """
    waiting = deque(tasks)
    workers = [_Worker(function) for _ in range(min(jobs, len(waiting)))]
    try:
        while workers:
            left = deadline - time.monotonic()
            pipes = [worker.pipe for worker in workers]
            heard = wait(pipes, None if left == float("inf") else max(left, 0.0))
            if not heard:
                return
            for worker in [worker for worker in workers if worker.pipe in heard]:
                finished = worker.hear()
                if finished is not None:
                    yield finished
                    if finished.died:
                        workers.remove(worker)
                        worker.end()
                        workers += [_Worker(function)] if waiting else []
                        continue
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process and the task that it has, if any."""

    def __init__(self, function: Callable[[Any], object]) -> None:
        # Forked, it could not use a GPU that this process uses.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self._process.start()
        theirs.close()
        self._task: list[Any] = []

    def give(self, task: Any) -> None:
        self._task = [task]
        with contextlib.suppress(OSError):  # dead already: its pipe will say so
            self.pipe.send(task)

    def hear(self) -> Finished | None:
        """What it says; None where it is ready for its first task."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            how = f"ended its process with exit code {self._process.exitcode}"
            if not self._task:
                raise RuntimeError(f"a process {how} before it had anything to do") from None
            return Finished(self._task[0], how, died=True)
        return None if said == _READY else Finished(self._task[0], *said)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[[Any], object]) -> None:
    pipe.send(_READY)
    while True:
        task = pipe.recv()
        try:
            function(task)
        except Exception as error:
            pipe.send((first_line(error),))
        else:
            pipe.send((None,))
