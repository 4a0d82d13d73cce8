"""The suite for this machine under pytest-benchmark: smoke on CUDA, cpu without.

Forward and backward of each provider on each case, until the device is idle again.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import LayerCase
from bench.correctness import Expectation
from bench.kinds import providers_for
from bench.passes import prepare
from bench.problem import Problem
from bench.providers import Provider
from bench.suites import SUITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUITE = SUITES["smoke" if DEVICE.type == "cuda" else "cpu"]
CASES = [
    pytest.param(case, provider, id=f"{case.name}-{provider.name}")
    for case in SUITE.cases_on(DEVICE.type)
    if isinstance(case, LayerCase)
    for provider in providers_for(case.op)
    if "backward" in provider.passes
    # Compiling takes most of a minute on two cores; one case shows that it works.
    if not provider.compiled or case in SUITE.compiled_cases_on(DEVICE.type)[:1]
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more would measure the scheduler
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "provider"), CASES)
def test_case(case: LayerCase, provider: Provider, benchmark) -> None:
    problem = Problem(case, DEVICE)
    with problem.mode.precision():
        module = provider.build(problem)
        if provider.masked:
            Expectation(problem).verify(module)
        name = "forward_backward" if "forward_backward" in provider.passes else "backward"
        call = prepare(name, provider, module, problem).call

        def until_idle() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.group = f"{case.name}, {name}"
        benchmark.pedantic(until_idle, rounds=30, iterations=5, warmup_rounds=3)
