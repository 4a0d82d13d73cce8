"""Measures many variants in several processes, of which any may die."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from .binary import Measurement, measure, prepare

if TYPE_CHECKING:
    from .variants import Variant

Task = tuple["Variant", int]

# Set before the processes are forked: kernels cannot be sent to a process, only inherited by it.
_tasks: Sequence[Task] = ()


def measure_all(tasks: Sequence[Task], jobs: int) -> Iterator[Measurement | str]:
    """The results in the order of the tasks; a string says why there is none."""
    global _tasks
    _tasks = tasks
    with (
        tempfile.TemporaryDirectory(prefix="dst_kernels_aot_") as cache,
        _processes(jobs, cache) as pool,
    ):
        futures = [pool.submit(_measure, index) for index in range(len(tasks))]
        for index, future in enumerate(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                # A failed assertion in the compiler ends the process and fails whatever else was
                # waiting. On its own, each task shows whether it was the culprit.
                yield _alone(index, cache)


def _alone(index: int, cache: str) -> Measurement | str:
    with _processes(1, cache) as pool:
        try:
            return pool.submit(_measure, index).result()
        except BrokenProcessPool:
            return "the compiler crashed and took its process with it (its output is above)"


def _processes(jobs: int, cache: str) -> ProcessPoolExecutor:
    # Forking is safe as long as this process has compiled nothing and so started no threads.
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare, initargs=(cache,))


def _measure(index: int) -> Measurement | str:
    try:
        return measure(*_tasks[index])
    except Exception as error:  # whatever the compiler raises is the result
        return f"does not compile: {type(error).__name__}: {error}".strip()
