"""`python -m bench.profiled`: one call of one pass, for a profiler that is told when it begins.

Arguments: a case's name and its columns M, N, K, dtype and remaining_ratio, then provider and pass.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .cases import AnyCase, ListCase, case_of
from .errors import first_line
from .kinds import providers_for
from .list_problem import ListProblem
from .passes import prepare
from .problem import Problem

__all__ = ["arguments", "call_once"]

_WARM_UP = 3  # the first calls compile, tune and make what backward needs


def arguments(case: AnyCase, provider: str, pass_name: str) -> list[str]:
    """The command line of this module."""
    columns = (*case.sizes, case.dtype, f"{case.remaining_ratio:g}")
    return [case.name, *columns, provider, pass_name]


def call_once(
    case: AnyCase,
    provider_name: str,
    pass_name: str,
    device: torch.device,
    profiling: Callable[[], AbstractContextManager],
) -> None:
    """Call the pass as the benchmark does, a few times to warm up and once within `profiling()`."""
    (provider,) = providers_for(case.op, [provider_name])
    if isinstance(case, ListCase):
        problem = ListProblem(case, device)
        with problem.mode.precision():
            _call(provider.calls[pass_name](problem), device, profiling)
        return
    problem = Problem(case, device)
    with problem.mode.precision(tune=True):
        prepared = prepare(pass_name, provider, provider.build(problem), problem)
        with prepared.surroundings():
            _call(prepared.call, device, profiling)


def _call(
    call: Callable[[], object],
    device: torch.device,
    profiling: Callable[[], AbstractContextManager],
) -> None:
    for _ in range(_WARM_UP):
        call()
    _synchronize(device)
    with profiling():
        call()
        _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    *columns, provider, pass_name = sys.argv[1:]
    device = torch.device("cuda")
    try:
        call_once(case_of(*columns), provider, pass_name, device, torch.cuda.profiler.profile)
    except Exception as error:
        traceback.print_exc()
        sys.exit(first_line(error))  # the last line, which is all that a report shows


if __name__ == "__main__":
    main()
