"""Kernels over lists of weights: shapes, least traffic, nothing wrong gets a bandwidth."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.cases import ListCase
from bench.errors import WrongResultError
from bench.kinds import load
from bench.list_problem import ListProblem
from bench.list_providers import LIST_PASSES, LIST_PROVIDERS, PACK, POST
from bench.models import ADAMW, SGD
from bench.shapes import WEIGHT_LISTS
from bench.work import list_bytes

CPU = torch.device("cpu")
SMALL = ListCase("small", "bf16-autocast")


def _figures(provider, case=SMALL):
    found = []
    try:
        load(case, CPU)(provider, lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


def test_the_weights_of_resnet_50():
    weights = WEIGHT_LISTS["resnet-50"]
    assert len(weights.shapes) == 54
    assert weights.numel == 25_502_912


def test_least_traffic_per_weight():
    bytes_per_weight = {PACK: 6, POST: 10, SGD: 20, ADAMW: 28}
    case = ListCase("4x4096x4096", "bf16-autocast")
    assert {name: list_bytes(case, name) / case.numel for name in LIST_PASSES} == bytes_per_weight


@pytest.mark.parametrize("dtype", ["bf16-autocast", "fp32"])
def test_the_problem_is_what_the_case_says(dtype):
    problem = ListProblem(ListCase("small", dtype, 0.25), CPU)
    for shape, weight, threshold, grad in zip(
        WEIGHT_LISTS["small"].shapes,
        problem.weights,
        problem.thresholds,
        problem.grads,
        strict=True,
    ):
        assert weight.shape == grad.shape == shape and weight.stride() == grad.stride()
        assert weight.dim() == 2 or weight.is_contiguous(memory_format=torch.channels_last)
        assert (weight.dtype, grad.dtype) == (problem.mode.weight, problem.mode.compute)
        assert (grad == 0).float().mean() < 0.01
        kept = (weight.flatten(1).abs() > threshold[:, None]).float().mean()
        assert 0.2 < kept < 0.3


@pytest.mark.parametrize("dtype", ["bf16-autocast", "fp32"])
def test_every_provider_has_its_figures(dtype):
    for provider in LIST_PROVIDERS:
        found = _figures(provider, ListCase("small", dtype))
        assert [figure[:2] for figure in found] == [
            (name, metric) for name in LIST_PASSES for metric in ("time", "spread", "bandwidth")
        ], found


def test_timing_a_step_leaves_the_problem_as_it_is():
    problem = ListProblem(SMALL, CPU)
    before = [weight.clone() for weight in (*problem.weights, *problem.thresholds)]
    for provider in LIST_PROVIDERS:
        for make in provider.calls.values():
            make(problem)()
    for now, then in zip((*problem.weights, *problem.thresholds), before, strict=True):
        assert torch.equal(now, then)


def _scaled(tensors, factor):
    return [tensor * factor for tensor in tensors]


def test_wrong_results_have_no_time(monkeypatch):
    from bench import list_providers

    right = list_providers.implementation
    (ours,) = (provider for provider in LIST_PROVIDERS if provider.name == "auto")

    def wrong(name, which):
        def implementation(backend, device, op):
            function = right(backend, device, op)
            if op != name:
                return function

            def off(*arguments):
                results = list(function(*arguments))
                results[which] = _scaled(results[which], 1.01)
                return results

            return off

        return implementation

    for op, which, message in (
        ("masked_weights", 0, "pack: masked weight 0 is not what"),
        ("masked_weights_backward", 0, "post: gradient of weight 0: error"),
        ("masked_weights_backward", 1, "post: gradient of threshold 0: error"),
    ):
        monkeypatch.setattr(list_providers, "implementation", wrong(op, which))
        *_, error, raised = _figures(ours)
        assert raised == "raised" and error[:2] == ("", "error") and error[2].startswith(message)


def test_a_wrong_step_has_no_time(monkeypatch):
    from bench import list_providers

    right = list_providers.deferred_optimizer
    (ours,) = (provider for provider in LIST_PROVIDERS if provider.name == "auto")

    def wrong(kind, model, hyper, backend="auto"):
        slower = dataclasses.replace(hyper, lr=hyper.lr * (1.001 if backend == "auto" else 1))
        return right(kind, model, slower, backend)

    monkeypatch.setattr(list_providers, "deferred_optimizer", wrong)
    *_, error, raised = _figures(ours)
    assert raised == "raised" and error[2].startswith("sgd: step of weight 0: error")
