"""All figures of one provider on a list of weights."""

from __future__ import annotations

import torch

from .cases import ListCase
from .errors import WrongResultError
from .list_problem import ListProblem
from .list_providers import ListProvider
from .measure import Add, Measure, one_thread, record_failure
from .results import ERROR
from .timing import device_time, graph_time
from .work import list_bytes

__all__ = ["load_list_case"]


def load_list_case(case: ListCase, device: torch.device) -> Measure:
    """What measures a provider: each pass is verified, then timed."""
    problem = ListProblem(case, device)

    def measure(provider: ListProvider, add: Add) -> None:
        with problem.mode.precision(), one_thread(device):
            for name in provider.passes:
                try:
                    _measure(name, provider, problem, add)
                except WrongResultError as error:
                    add("", ERROR, f"{name}: {error}")
                    raise
                except Exception as error:
                    record_failure(add, name, error, device)

    return measure


def _measure(name: str, provider: ListProvider, problem: ListProblem, add: Add) -> None:
    """Bandwidth under a CUDA graph: calls with dozens of tensors are no shorter than the host."""
    if provider.verify is not None:
        provider.verify(name, problem)
    call = provider.calls[name](problem)
    timing = device_time(call, problem.device)
    add(name, "time", timing.median, "s")
    add(name, "spread", timing.spread, "s")
    seconds = timing.median
    if problem.device.type == "cuda":
        try:
            seconds = graph_time(call).median
            add(name, "graph_time", seconds, "s")
        except Exception as error:
            record_failure(add, name, error, problem.device, "graph_time: ")
    add(name, "bandwidth", list_bytes(problem.case, name) / seconds, "B/s")
