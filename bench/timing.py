"""How long a call takes: on the device, on the host, under a CUDA graph, on the wall clock.

All times are in seconds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = [
    "Timing",
    "device_time",
    "graph_time",
    "host_time",
    "one_stream",
    "peak_memory",
    "replayed",
    "wall_time",
]

T = TypeVar("T")

_SECONDS = 0.05  # to spend on the samples of a wall clock
_SHORT = 5e-3
_WARM_UP_MS, _REPEAT_MS = 15, 60
_GRAPH_SECONDS, _MOST_IN_GRAPH, _MOST_REPLAYS, _SAMPLES = 0.01, 100, 100, 10
_FEWEST, _MOST = 5, 200
_CALLS_BETWEEN_SYNCHRONISATIONS = 10


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the samples."""

    median: float
    spread: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], 0.0)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, high - low)


def device_time(call: Callable[[], object], device: torch.device) -> Timing:
    """CUDA: events around each call, L2 flushed before it. CPU: the wall clock."""
    if device.type != "cuda":
        return wall_time(call, device)
    from triton.testing import do_bench

    samples = do_bench(call, warmup=_WARM_UP_MS, rep=_REPEAT_MS, return_mode="all")
    return Timing.of([ms / 1e3 for ms in samples])


def graph_time(call: Callable[[], object], most: int = _MOST_IN_GRAPH) -> Timing:
    """CUDA only: many calls in one CUDA graph, so without any host work between kernels; warm L2.

    As triton's do_bench_cudagraph, but the first call, which may run a forward for a backward, is
    on the stream that captures: autograd runs a backward where its forward ran. Up to `most` calls
    are captured: 1 for a whole training step, which is replayed again and again. Raises what the
    capture raises.
    """
    with one_stream(torch.device("cuda")):
        call()
        call()
        estimate = _between_events(lambda: [call() for _ in range(5)]) / 5
        count = max(1, min(most, int(_GRAPH_SECONDS / estimate)))
        graph, _ = _capture(call, count)
        replays = max(1, min(_MOST_REPLAYS, int(_GRAPH_SECONDS / (estimate * count))))
        graph.replay()
        samples = [
            _between_events(lambda: [graph.replay() for _ in range(replays)]) / (count * replays)
            for _ in range(_SAMPLES)
        ]
        return Timing.of(samples)


def replayed(call: Callable[[], T], eager: int, replays: int) -> Iterator[T]:
    """CUDA only: the results of `eager` calls, then of as many replays of one captured call.

    Each result must be read before the next. Raises what the capture raises.
    """
    with one_stream(torch.device("cuda")):
        for _ in range(eager):
            yield call()
        graph, result = _capture(call, 1)
        for _ in range(replays):
            graph.replay()
            yield result


@contextlib.contextmanager
def one_stream(device: torch.device) -> Iterator[None]:
    """CUDA: on a stream that can capture, that of an outer `one_stream` if there is one."""
    if device.type != "cuda" or torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _capture(call: Callable[[], T], count: int) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `count` calls on the current stream, and what the last of them returns."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool=pool)
    try:
        for _ in range(count):
            result = call()
        graph.capture_end()
    except Exception:
        with contextlib.suppress(Exception):  # it only says that the capture failed
            graph.capture_end()
        _forget_capture(pool)
        raise
    return graph, result


def _forget_capture(pool: tuple[int, int]) -> None:
    """What torch does at the end of a capture, but not of one that failed.

    Else its allocator would take the capture for going on, and never again empty its cache: it
    raises, and what was allocated for the graph is lost.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # torch got that far
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _between_events(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def wall_time(
    call: Callable[[], object], device: torch.device, seconds: float = _SECONDS
) -> Timing:
    """From one idle device to the next; short calls on CUDA ten at a time, as a loop would.

    Takes about `seconds`.
    """
    call()
    _synchronize(device)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    short = device.type == "cuda" and time.perf_counter() - begin < _SHORT
    together = _CALLS_BETWEEN_SYNCHRONISATIONS if short else 1
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < _FEWEST or (
        len(samples) < _MOST and time.perf_counter() - begin < seconds
    ):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            call()
        _synchronize(device)
        samples.append((time.perf_counter() - start) / together)
    return Timing.of(samples)


def host_time(call: Callable[[], object], device: torch.device) -> Timing:
    """CUDA only: until a call has returned, its kernels being enqueued, not finished."""
    call()
    samples = []
    for _ in range(_FEWEST):
        _synchronize(device)
        for _ in range(_CALLS_BETWEEN_SYNCHRONISATIONS):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    _synchronize(device)
    return Timing.of(samples)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """CUDA only: most bytes allocated during a call, beyond those allocated before it."""
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
