"""Run as one of several processes, which torchrun or accelerate has started.

All of them give the same command and train on their share of each batch. The first one alone reads
and writes the run's folder and tells the others; what it cannot do ends all of them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UsageError

_T = TypeVar("_T")


def launched() -> bool:
    """Return whether a launcher has started this process, and may start it again after a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def joined() -> bool:
    """Return whether this process and others train together."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Return the number of this process, from 0 to `count()` - 1."""
    return dist.get_rank() if joined() else int(os.environ.get("RANK", 0)) if launched() else 0


def on_this_machine() -> tuple[int, int]:
    """Return the number of this process among those of its machine, and how many they are."""
    if not joined():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that the launcher has started, if there are several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # Objects and plain numbers go through gloo, gradients through NCCL (RCCL) or XCCL on GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.xpu.is_available():
        backend = "cpu:gloo,xpu:xccl"
    try:
        store, rank, count = next(dist.rendezvous("env://"))
        # Of torchrun's restarts all have one store, with the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not find each other "
            f"({str(error).splitlines()[0]}). Accepted: a command that starts with torchrun or "
            "accelerate launch, or no WORLD_SIZE in the environment."
        ) from error
    try:
        yield
        # Sharded modules are in cycles, and hold what belongs to the group. Left to Python's end,
        # runs aborted now and then (torch 2.14, gloo), perhaps in a thread of gloo.
        gc.collect()
    finally:
        dist.destroy_process_group()


def leave_word_to_first(exit_code: int) -> NoReturn:
    """End this process, after the first one has had the time to say why.

    The launcher ends all processes as soon as one of them has ended.
    """
    time.sleep(10)
    raise SystemExit(exit_code)


def from_first(function: Callable[[], _T]) -> _T:
    """Return in every process what `function` returns in the first, the only one to call it.

    Where it raises UsageError there, the others end, too. The result must be picklable.
    """
    if not joined():
        return function()
    told: list[Any] = [None, None]
    error = None
    if rank() == 0:
        try:
            told[0] = function()
        except UsageError as caught:
            error, told[1] = caught, caught.exit_code
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if error is not None:
        raise error
    if told[1] is not None:
        leave_word_to_first(told[1])
    return told[0]


def first_before_others(function: Callable[[], _T]) -> _T:
    """Call `function` in the first process, which may download, then in the others."""
    results = []
    from_first(lambda: results.append(function()))
    return results[0] if results else function()


def total(*values: float | Tensor) -> list[float]:
    """Return the sums of these numbers over all processes."""
    if not joined():
        return [float(value) for value in values]
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()
