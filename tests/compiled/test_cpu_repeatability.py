"""A segment gives the same bits on any number of threads, alone, among others and at any place."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cpu_cases import DTYPES, needs_library, ops, pack, post, real, threshold_of, weights_of
from cpu_steps import STATE, Segment, call_of, written

pytestmark = needs_library

# Together more than a thread's least share of work; long rows are cut, and not where threads are.
SHAPES = ((300, 784), (100, 300), (10, 100), (1, 100_001), (3, 70_000), (64, 32, 3, 3), (2000, 9))
NO_GUARD = (-1, 0)
THREADS = (1, 2, 3, 5)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor):
    """To compare NaN and signed zeros, too."""
    if not tensor.is_floating_point():
        return tensor
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def equal(ones, others):
    return all(torch.equal(bits(one), bits(other)) for one, other in zip(ones, others, strict=True))


def weight_problem():
    """grads, weights, thresholds, settings: all granularities and dtypes."""
    weights = [w.to(dtype) for w, dtype in zip(weights_of(torch.float32, SHAPES), DTYPES * 2)]  # noqa: B905
    granularities = ("row", "layer", "row", "row", "layer", "element", "row")
    thresholds = [threshold_of(w, g) for w, g in zip(weights, granularities, strict=True)]
    grads = [torch.empty_like(weight, dtype=real(weight.dtype)).normal_() for weight in weights]
    return grads, weights, thresholds, [(i % 4, 1) for i in range(len(weights))]


def test_post_on_any_number_of_threads():
    problem = weight_problem()
    results = []
    for count in THREADS:
        with threads(count):
            results.append([*post(*problem)[0], *post(*problem)[1]])
    assert all(equal(results[0], others) for others in results[1:])


def test_pack_on_any_number_of_threads():
    _, weights, thresholds, _ = weight_problem()
    guards = [(weight.numel() * (i % 2), 1) for i, weight in enumerate(weights)]
    results = []
    for count in THREADS:
        with threads(count):
            masked, effective, kept, stored = pack(weights, thresholds, guards, DTYPES[:1] * 7)
        results.append([*masked, *effective, kept, *stored])
    assert all(equal(results[0], others) for others in results[1:])


def test_post_alone_and_among_others():
    problem = weight_problem()
    with threads(2):
        together = post(*problem)
        backwards = post(*(entries[::-1] for entries in problem))
        for i in range(len(SHAPES)):
            alone = post(*([entries[i]] for entries in problem))
            for (one,), all_, reverse in zip(alone, together, backwards, strict=True):
                assert equal([one, one], [all_[i], reverse[-1 - i]])


def step_problem(rule):
    torch.manual_seed(2)
    segments = [
        Segment(shape, dtype, masked=torch.bfloat16, surrogate=i % 4, plain=i == 4)
        for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES * 2))  # noqa: B905
    ]
    segments.append(Segment((400, 300), collapsed=10**6))
    return call_of(rule, segments, grad_scale=3.0, clip=0.7, alphas=[0.1] * 4)


@pytest.mark.parametrize("rule", list(STATE))
def test_steps_on_any_number_of_threads(rule):
    call = step_problem(rule)
    results, norms = [], []
    for count in THREADS:
        with threads(count):
            ours = call.run()
            norms.append(call.norm(ops().grad_norm))
        tensors = [tensor for name in [*written(rule), "masked"] for tensor in ours[name]]
        results.append([*tensors, ours["kept"]])
    assert all(equal(results[0], others) for others in results[1:])
    assert all(torch.equal(norms[0], norm) for norm in norms)


@pytest.mark.parametrize("rule", list(STATE))
def test_steps_alone_and_among_others(rule):
    call = step_problem(rule)
    with threads(2):
        together = call.run()
        for i in range(len(call["weights"])):
            alone = step_problem(rule)
            for name, value in alone.values.items():
                if name == "settings":
                    alone.values[name] = value[7 * i : 7 * i + 7]
                elif name in (*written(rule), "grads", "threshold_grads", "masked"):
                    alone.values[name] = [value[i]]
            alone.values["kept"] = alone["kept"][i : i + 1]
            ours = alone.run()
            assert ours["kept"][0] == together["kept"][i]
            for name in [*written(rule), "masked"]:
                assert equal(ours[name], [together[name][i]]), (name, i)
