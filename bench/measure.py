"""All figures of one provider on one case."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch import nn

from .correctness import Expectation
from .errors import WrongResultError, first_line
from .passes import prepare, saved_bytes
from .problem import Problem
from .providers import Provider, available_passes
from .results import ERROR, SKIPPED
from .timing import device_time, graph_time, host_time, peak_memory, wall_time
from .work import flops, least_bytes

__all__ = ["Add", "DeviceLostError", "measure"]

Add = Callable[..., None]
"""add(pass, metric, value, unit) records one figure."""

_SHORT = 1e-3  # below this many seconds launches matter: timed under a CUDA graph as well
_HOST_MATTERS = 5e-3  # above, nobody asks what a call costs the host


class DeviceLostError(RuntimeError):
    """After a fault on the device nothing runs on it in this process any more."""


def measure(provider: Provider, problem: Problem, expectation: Expectation, add: Add) -> None:
    """Verify the provider, then time its passes; what fails is recorded with its reason.

    Raises WrongResultError, recorded too, and DeviceLostError.
    """
    case = problem.case
    with problem.mode.matmul_precision():
        try:
            module = provider.build(problem)
            if provider.masked:
                expectation.verify(module)
        except WrongResultError as error:
            add("", ERROR, str(error))
            raise
        except Exception as error:
            _record_failure(add, "", error, problem.device)
            return
        try:
            add("forward", "saved", saved_bytes(module, problem), "B")
        except Exception as error:
            _record_failure(add, "forward", error, problem.device, "saved: ")
        for name in available_passes(provider, case.op):
            try:
                _measure_pass(name, provider, module, problem, add)
            except Exception as error:
                _record_failure(add, name, error, problem.device)


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
        _record_failure(add, name, error, device, "graph_time: ")


def _record_failure(
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
        torch.cuda.empty_cache()
    add(name, SKIPPED, reason)


def _fault(device: torch.device) -> Exception | None:
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return error
    return None
