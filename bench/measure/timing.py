"""What a call costs: seconds on the device, the host, in a CUDA graph; memory and launches."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dst_kernels.training.latency import take_turns

Call = Callable[[], Any]

_WARM_UP_MS, _REPEAT_MS = 15, 60
_WARM_UP, _FEWEST, _MOST = 3, 5, 200  # calls, samples, samples
_SHORT, _TOGETHER = 5e-3, 10  # calls of fewer seconds are timed ten at a time
_TURN_SECONDS = 0.03  # of one contender: long enough to find its data in the caches again
_GRAPH_SECONDS, _MOST_REPEATS, _GRAPH_SAMPLES = 0.01, 100, 10  # of a call in it, and of replays
_LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset")  # no ranges and no calls of the host


class Timing(NamedTuple):
    """Median and interquartile range of the samples."""

    median: float
    spread: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        exact = torch.tensor(samples, dtype=torch.float64)
        low, middle, high = (exact.quantile(share).item() for share in (0.25, 0.5, 0.75))
        return cls(middle, high - low)


def device_time(call: Call, device: torch.device) -> Timing:
    """Time calls by events around each, L2 flushed before it; on a CPU by the wall clock."""
    if device.type != "cuda":
        return wall_time(call, device)
    from triton.testing import do_bench

    samples = do_bench(call, warmup=_WARM_UP_MS, rep=_REPEAT_MS, return_mode="all")
    return Timing.of([ms / 1e3 for ms in samples])


def wall_time(call: Call, device: torch.device, seconds: float = 0.05) -> Timing:
    """Time for some seconds from an idle device to the next; short calls on CUDA ten at a time."""
    _on_the_clock(call, device, _WARM_UP)
    short = device.type == "cuda" and _on_the_clock(call, device) < _SHORT
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < _FEWEST or (len(samples) < _MOST and time.perf_counter() < end):
        samples.append(_on_the_clock(call, device, _TOGETHER if short else 1))
    return Timing.of(samples)


def in_turns(calls: dict[str, Call], base: str) -> dict[str, Timing]:
    """Time calls on a CPU in turns: what else runs on the machine then meets all of them alike.

    The median is that of `base`, if that is there, times the median of the rounds' ratios to it.
    """
    samples = take_turns(calls, _TURN_SECONDS)
    found = {name: Timing.of(some) for name, some in samples.items()}
    for name in found.keys() - {base} if base in found else ():
        ratios = [mine / one for mine, one in zip(samples[name], samples[base], strict=True)]
        found[name] = Timing(*(found[base].median * of for of in Timing.of(ratios)))
    return found


def host_time(call: Call, device: torch.device) -> Timing:
    """Time until calls have returned, their kernels on CUDA being enqueued, not finished."""
    call()
    return Timing.of([_on_the_clock(call, device, _TOGETHER, False) for _ in range(_FEWEST)])


def _on_the_clock(call: Call, device: torch.device, times: int = 1, wait: bool = True) -> float:
    """Return the seconds of one of several calls, from an idle device on."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if wait:
        synchronize()
    return (time.perf_counter() - start) / times


def peak_memory(call: Call, before: int | None = None) -> int:
    """Return the most bytes allocated on CUDA during a call, beyond those allocated `before`."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if before is None else before
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def count_launches(call: Call) -> int:
    """Count the kernels, copies and fills of a call; raises RuntimeError without permission."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))
    count = sum(event.get("cat") in _LAUNCHES for event in trace["traceEvents"])
    if count == 0:
        raise RuntimeError("the profiler saw no kernels")
    return count


def graph_time(call: Call, alone: bool = False) -> Timing:
    """Time many calls in a CUDA graph (`alone`: one), so without the host's work; L2 is warm.

    As triton's do_bench_cudagraph, but the first call, which may make a forward's graph, is on the
    stream that captures: autograd runs a backward there. Raises what the capture raises.
    """
    with one_stream(torch.device("cuda")):
        call()
        call()
        estimate = _between_events(call, 5)
        count = 1 if alone else max(1, min(_MOST_REPEATS, int(_GRAPH_SECONDS / estimate)))
        graph, _ = _capture(call, count)
        replays = max(1, min(_MOST_REPEATS, int(_GRAPH_SECONDS / (estimate * count))))
        graph.replay()
        samples = [_between_events(graph.replay, replays) / count for _ in range(_GRAPH_SAMPLES)]
        return Timing.of(samples)


def replayed(call: Call, eager: int, replays: int) -> Iterator[Any]:
    """Yield results of calls, then of replays of one captured call: read each before the next."""
    with one_stream(torch.device("cuda")):
        for _ in range(eager):
            yield call()
        graph, result = _capture(call, 1)
        for _ in range(replays):
            graph.replay()
            yield result


@contextlib.contextmanager
def one_stream(device: torch.device) -> Iterator[None]:
    """Use on CUDA a stream that can capture, that of an outer `one_stream` if there is one."""
    if device.type != "cuda" or torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _capture(call: Call, count: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of `count` calls on the current stream, and what the last of them returns."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool=pool)
    try:
        for _ in range(count):
            result = call()
        graph.capture_end()
    except Exception:
        with contextlib.suppress(Exception):  # it only says that the capture failed
            graph.capture_end()
        # What torch does at the end of a capture, but not of one that failed. Else its allocator
        # would take the capture for going on, and never again empty its cache.
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # torch got that far
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    return graph, result


def _between_events(call: Call, times: int) -> float:
    """Return the seconds that one of several calls in a row takes the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times
