"""All figures of one provider's training step."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable

import torch

from .cases import ModelCase
from .errors import WrongResultError
from .launches import count_launches
from .measure import Add, Measure, record_failure
from .model_providers import STEP, ModelProvider
from .results import ERROR
from .timing import graph_time, one_stream, wall_time
from .training import AT_REST, Setup, Training
from .trajectory import TrajectoryExpectation

__all__ = ["load_model_case"]

_WARM_UP = 3
_CAPTURABLE = "This instance was constructed with capturable"  # as it is meant
_SECONDS = 0.3  # a neighbour on the machine, or a busy host, should not decide


def load_model_case(case: ModelCase, device: torch.device) -> Measure:
    """What measures a provider: after its verification, eagerly and as a CUDA graph."""
    setup = Setup(case.model, case.batch, case.remaining_ratio, device, case.mode, AT_REST)
    expectation = functools.cache(lambda: TrajectoryExpectation(setup))
    if device.type == "cuda":
        # From its first use on the profiler costs each launch a little: let all pay alike.
        with contextlib.suppress(RuntimeError):
            count_launches(lambda: None, device)

    def measure(provider: ModelProvider, add: Add) -> None:
        try:
            with setup.mode.precision(tune=True), warnings.catch_warnings():
                warnings.filterwarnings("ignore", _CAPTURABLE)
                _measure(provider, setup, expectation, add)
        finally:
            if device.type == "cuda":
                gc.collect()  # modules and their hooks are cycles, which hold gigabytes
                torch.cuda.empty_cache()

    return measure


def _measure(
    provider: ModelProvider,
    setup: Setup,
    expectation: Callable[[], TrajectoryExpectation],
    add: Add,
) -> None:
    try:
        if provider.masked:
            expectation().verify(provider)
    except WrongResultError as error:
        add("", ERROR, str(error))
        raise
    except Exception as error:
        record_failure(add, "", error, setup.device)
        return
    # On one stream from the first step on: what autograd keeps must have begun where a graph is
    # captured, and a compiled model is not compiled again.
    with one_stream(setup.device):
        try:
            training = _measure_eager(provider, setup, add)
        except Exception as error:
            record_failure(add, STEP, error, setup.device)
            return
        if setup.device.type == "cuda" and provider.graphable:
            _measure_graph(provider, training, setup, expectation, add)


def _measure_eager(provider: ModelProvider, setup: Setup, add: Add) -> Training:
    """Time and throughput, and on CUDA memory and launches."""
    device, on_gpu = setup.device, setup.device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    training = provider.train(setup)
    for _ in range(_WARM_UP):
        training.step()
    timing = wall_time(training.step, device, _SECONDS)
    add(STEP, "time", timing.median, "s")
    add(STEP, "spread", timing.spread, "s")
    add(STEP, "throughput", *_throughput(setup, timing.median))
    if not on_gpu:
        return training
    # Parameters, packed copies and the optimizer's state count: a mode may trade one for another.
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    training.step()
    torch.cuda.synchronize(device)
    add(STEP, "memory", torch.cuda.max_memory_allocated(device) - before, "B")
    try:
        add(STEP, "launches", count_launches(training.step, device))
    except Exception as error:
        record_failure(add, STEP, error, device, "launches: ")
    return training


def _measure_graph(
    provider: ModelProvider,
    training: Training,
    setup: Setup,
    expectation: Callable[[], TrajectoryExpectation],
    add: Add,
) -> None:
    try:
        if provider.masked and not provider.compiled:
            expectation().verify_graph(provider)
        torch.cuda.empty_cache()  # a graph has memory of its own
        seconds = graph_time(training.step, most=1).median
        add(STEP, "graph_time", seconds, "s")
        add(STEP, "graph_throughput", *_throughput(setup, seconds))
    except WrongResultError as error:
        add("", ERROR, str(error))
        raise
    except Exception as error:
        record_failure(add, STEP, error, setup.device, "graph_time: ")


def _throughput(setup: Setup, seconds: float) -> tuple[float, str]:
    """A number and its unit: images or tokens a second."""
    return setup.batch * setup.about.units / seconds, f"{setup.about.unit}/s"
