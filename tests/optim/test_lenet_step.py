"""A whole training step of LeNet-300-100 on the CPU, in turns: the machine may be busy."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from bench.cases import ModelCase
from bench.contenders import REFERENCES, contenders_for, problem_of
from dst_kernels.backends import unavailable

pytestmark = [pytest.mark.timing, pytest.mark.slow]

CASE = ModelCase("lenet-300-100", 64, dtype="fp32")
LIMIT = 1.25  # times the dense step, for the best way we offer
LAYER_BY_LAYER_LIMIT = 1.6  # with torch's optimizer, where there is the library for the CPU
REFERENCE_LIMIT = 3.0  # on the reference path; the authors' layers: 4.5


def _ratios_to_dense(steps, rounds):
    """Return the median over the rounds of ten steps of each."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(10):
                step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(map(float.__truediv__, values, seconds["dense"]))
        for name, values in seconds.items()
    }


def test_a_masked_step_costs_little_more_than_a_dense_one():
    problem = problem_of(CASE, torch.device("cpu"))
    everybody = REFERENCES["model"], *contenders_for(CASE, compiled=False)
    steps = {one.name: one.make(problem).prepare("step").call for one in everybody}
    _ratios_to_dense(steps, rounds=6)  # warm up
    # Neighbours on the machine cost the step with more memory traffic more: the calmest of three.
    attempts = [_ratios_to_dense(steps, rounds=30) for _ in range(3)]
    ratios = {name: min(attempt[name] for attempt in attempts) for name in steps}
    print(ratios)
    assert ratios["reference"] <= REFERENCE_LIMIT
    assert ratios["reference"] < ratios["dst_eager"]
    assert ratios["deferred"] <= LIMIT
    if unavailable("cpu") is None:
        assert ratios["masked"] <= LAYER_BY_LAYER_LIMIT
