"""All figures of one provider on one op."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .cases import LayerCase
from .correctness import Expectation
from .errors import WrongResultError, first_line
from .passes import prepare, saved_bytes
from .problem import Problem
from .providers import Provider
from .results import ERROR, SKIPPED
from .timing import device_time, graph_time, host_time, peak_memory, wall_time
from .work import flops, least_bytes

__all__ = [
    "Add",
    "DeviceLostError",
    "Measure",
    "load_case",
    "measure",
    "one_thread",
    "record_failure",
]

Add = Callable[..., None]
"""add(pass, metric, value, unit) records one figure."""

Measure = Callable[[Any, Add], None]
"""Verifies a provider on a case, then times it; what fails is recorded with its reason.

Raises WrongResultError, recorded too, and DeviceLostError.
"""

_SHORT = 1e-3  # below this many seconds launches matter: timed under a CUDA graph as well
_HOST_MATTERS = 5e-3  # above, nobody asks what a call costs the host


class DeviceLostError(RuntimeError):
    """After a fault on the device nothing runs on it in this process any more."""


def load_case(case: LayerCase, device: torch.device) -> Measure:
    """The case's data and what is right; raises where they do not fit the device."""
    problem = Problem(case, device)
    with problem.mode.precision():
        expectation = Expectation(problem)

    def of_provider(provider: Provider, add: Add) -> None:
        with one_thread(device):
            measure(provider, problem, expectation, add)

    return of_provider


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, where more threads on tiny tensors would measure the scheduler."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(provider: Provider, problem: Problem, expectation: Expectation, add: Add) -> None:
    """As `Measure`, for one op."""
    with problem.mode.precision(tune=True):
        try:
            module = provider.build(problem)
            if provider.masked:
                expectation.verify(module)
        except WrongResultError as error:
            add("", ERROR, str(error))
            raise
        except Exception as error:
            record_failure(add, "", error, problem.device)
            return
        try:
            add("forward", "saved", saved_bytes(module, problem), "B")
        except Exception as error:
            record_failure(add, "forward", error, problem.device, "saved: ")
        for name in provider.passes:
            try:
                _measure_pass(name, provider, module, problem, add)
            except Exception as error:
                record_failure(add, name, error, problem.device)


def _measure_pass(
    name: str, provider: Provider, module: nn.Module, problem: Problem, add: Add
) -> None:
    case, device = problem.case, problem.device
    prepared = prepare(name, provider, module, problem)
    timer = wall_time if name == "step" else device_time
    with prepared.surroundings():
        timing = timer(prepared.call, device)
        add(name, "time", timing.median, "s")
        add(name, "spread", timing.spread, "s")
        for metric, work, unit in (
            ("flops", flops(case, name), "FLOP/s"),
            ("bandwidth", least_bytes(case, name), "B/s"),
        ):
            if work is not None:
                add(name, metric, work / timing.median, unit)
        if device.type != "cuda":
            return
        add(name, "memory", peak_memory(prepared.call, device), "B")
        if name != "step" and timing.median < _HOST_MATTERS:
            add(name, "host_time", host_time(prepared.call, device).median, "s")
    if name == "step" or timing.median >= _SHORT or not provider.graphable:
        return
    # Prepared anew: a graph of backward alone needs its forward on the capturing stream.
    prepared = prepare(name, provider, module, problem)
    try:
        with prepared.surroundings():
            add(name, "graph_time", graph_time(prepared.call).median, "s")
    except Exception as error:
        record_failure(add, name, error, device, "graph_time: ")


def record_failure(
    add: Add, name: str, error: Exception, device: torch.device, what: str = ""
) -> None:
    """Record why something has no figures. Raises DeviceLostError where the device is gone."""
    reason = what + first_line(error)
    traceback.clear_frames(error.__traceback__)  # which hold the tensors that did not fit
    if device.type == "cuda":
        fault = _fault(device) and _fault(device)  # what only one call reports has passed
        if fault is not None:
            add(name, ERROR, f"the device faulted: {reason}")
            raise DeviceLostError(first_line(fault)) from error
    add(name, SKIPPED, reason)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fault(device: torch.device) -> Exception | None:
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return error
    return None
