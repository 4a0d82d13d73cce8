"""Whole models: their sizes, the same start for everybody, no time for wrong trainings."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

import dst_kernels
from bench.baselines import (
    authors_regularization,
    with_authors_layers_,
    with_branch_free_layers_,
)
from bench.cases import Case, ListCase, ModelCase, case_of
from bench.errors import UsageError, WrongResultError
from bench.kinds import load, providers_for
from bench.launches import launches_in
from bench.model_providers import MODEL_PROVIDERS, REFERENCE, STEP, ModelProvider
from bench.models import MODELS, SGD
from bench.modes import MODES
from bench.training import AT_REST, LEARNING, MOMENTUM, Setup, Training, torch_optimizer
from bench.trajectory import TrajectoryExpectation

CPU = torch.device("cpu")
FIGURES = [(STEP, metric) for metric in ("time", "spread", "throughput")]
EAGER = [provider for provider in MODEL_PROVIDERS if not provider.compiled]
MASKED = [provider for provider in EAGER if provider.masked]
SMALL = (
    "lenet-5",
    "vgg-small",
    "wrn-small",
    "resnet-small",
    "convnext-small",
    "vit-small",
    "gpt-small",
    "lstm-small",
    "linear-64",
)

# Parameters, masked weights, thresholds.
SIZES = {
    "lenet-300-100": (266_610, 266_200, 410),
    "vgg-16": (14_987_722, 14_977_728, 4_746),
    "lenet-5": (431_080, 430_500, 580),
    "wrn-28-8": (23_354_842, 23_340_464, 8_090),
    "resnet-50": (25_557_032, 25_502_912, 27_560),
    "convnext-t": (28_589_128, 28_524_000, 42_184),
    "vit-b-16": (86_567_656, 57_980_928, 47_848),
    "gpt": (124_439_808, 84_934_656, 82_944),
    # Of the masked ones 210,944 and 2,048 are the LSTM's.
    "lstm-a": (214_282, 212_224, 2_058),
    "linear-4096": (4096 * 4096 + 4096, 4096 * 4096, 4096),
}


def _setup(model="lenet-300-100", dtype="fp32", hyper=None):
    return Setup(model, 8, 0.5, CPU, MODES[dtype], hyper or LEARNING[MODELS[model].optimizer])


def _masked_sizes(model):
    thresholds = {name: p for name, p in model.named_parameters() if "threshold" in name}
    weights = [model.get_parameter(name.replace("threshold", "weight")) for name in thresholds]
    return tuple(sum(p.numel() for p in those) for those in (weights, thresholds.values()))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("convert_", [dst_kernels.sparsify_, with_authors_layers_])
def test_sizes_are_those_of_the_paper(name, convert_):
    with torch.device("meta"):
        model = MODELS[name].network()
    assert (sum(p.numel() for p in model.parameters()), *_masked_sizes(convert_(model))) == SIZES[
        name
    ]


@pytest.mark.parametrize("name", MODELS)
def test_everybody_masks_the_same_layers(name):
    masked = []
    for convert_ in (dst_kernels.sparsify_, with_authors_layers_, with_branch_free_layers_):
        with torch.device("meta"):
            model = convert_(MODELS[name].network())
        masked.append([path for path, one in model.named_modules() if hasattr(one, "threshold")])
    assert masked[0] and masked[0] == masked[1] == masked[2]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_small_one_of_its_kind(name):
    model, small = MODELS[name], MODELS[MODELS[name].small]
    assert (small.optimizer, small.loss) == (model.optimizer, model.loss)
    with torch.device("meta"):
        kinds = [_layer_types(each.network()) for each in (model, small)]
    assert kinds[0] == kinds[1]


def _layer_types(model):
    return {type(module) for module in model.modules() if not any(module.children())}


@pytest.mark.parametrize("name", SMALL)
def test_everybody_starts_from_the_same(name):
    start = {}
    for provider in MASKED:
        model = provider.train(_setup(name)).model
        start[provider.name] = {key: p.detach() for key, p in model.named_parameters()}
        kept = [
            (layer.weight.flatten(1).abs() > layer.threshold[:, None]).float().mean()
            for layer in model.modules()
            if isinstance(getattr(layer, "threshold", None), nn.Parameter)
        ]
        assert 0.45 < torch.stack(kept).mean() < 0.6
    for other in start.values():
        torch.testing.assert_close(other, start["masked"], rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_a_timed_step_leaves_the_case_as_it_is(name):
    for provider in EAGER:
        training = provider.train(_setup(name, hyper=AT_REST))
        before = {key: p.detach().clone() for key, p in training.model.named_parameters()}
        for _ in range(2):
            training.step()
        after = {key: p.detach() for key, p in training.model.named_parameters()}
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lenet-300-100", *SMALL])
def test_right_providers_pass(name):
    expectation = TrajectoryExpectation(_setup(name, "bf16-autocast"))
    for provider in MASKED:
        expectation.verify(provider)


@pytest.mark.parametrize("name", ["lenet-300-100", *SMALL])
def test_no_layer_collapses_in_what_is_compared(name):
    """Ways of training commit a reset at different times: in a forward, or in the step before."""
    training = REFERENCE.train(_setup(name))
    for _ in range(5):
        training.step()
    layers = [module for module in training.model.modules() if hasattr(module, "remaining_ratio")]
    assert layers and min(layer.remaining_ratio() for layer in layers) > 0.1


def _training(setup, penalty=authors_regularization, **changes):
    """The authors' layers with torch's optimizer; `changes`: factors of the recipe's numbers."""
    factors = {
        key: getattr(setup.hyper, key) * factor
        for key, factor in changes.items()
        if hasattr(setup.hyper, key)
    }
    hyper = dataclasses.replace(setup.hyper, **factors)
    model = setup.network(with_authors_layers_)
    decayed = changes.get("decay_thresholds", False)
    thresholds = [p for name, p in model.named_parameters() if name.endswith("threshold")]
    others = [p for name, p in model.named_parameters() if not name.endswith("threshold")]
    groups = [{"params": others}, {"params": thresholds}]
    if not decayed:
        groups[1]["weight_decay"] = 0.0
    optimizer = torch_optimizer(setup.about.optimizer, hyper, setup.device, groups)
    if setup.about.optimizer == SGD:
        for group in optimizer.param_groups:
            group["momentum"] = changes.get("momentum", MOMENTUM)
    return Training(dataclasses.replace(setup, hyper=hyper), model, optimizer, penalty)


MISTAKES = {
    "other rate": {"lr": 1.1},
    "no weight decay": {"weight_decay": 0.0},
    "thresholds decay": {"decay_thresholds": True},
    "weaker regulariser": {"alpha": 0.5},
    "no regulariser": {"penalty": None},
    "no momentum": {"momentum": 0.0},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["lenet-300-100", "linear-64"])
def test_a_training_with_another_recipe_is_found_in_every_mode(name, mistake):
    if mistake == "no momentum" and MODELS[name].optimizer != SGD:
        pytest.skip("AdamW has none")
    wrong = ModelProvider("wrong", lambda setup: _training(setup, **MISTAKES[mistake]))
    right = ModelProvider("right", _training)
    expectation = TrajectoryExpectation(_setup(name))
    expectation.verify(right)
    for mode in expectation.modes():
        with pytest.raises(WrongResultError, match=r"steps of .* error"):
            expectation.compare(wrong, mode)


def _figures(provider, case):
    found = []
    try:
        load(case, CPU)(provider, lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


def test_a_wrong_training_has_no_time():
    wrong = ModelProvider("wrong", lambda setup: _training(setup, penalty=None))
    error, raised = _figures(wrong, ModelCase("linear-64", 8, "fp32"))
    assert error[:2] == ("", "error") and "losses after 5 steps" in error[2]
    assert raised == "raised"


def test_a_training_that_cannot_run_says_why():
    def train(setup):
        raise RuntimeError("not here")

    case = ModelCase("linear-64", 8, "fp32")
    assert _figures(ModelProvider("absent", train), case) == [
        ("", "skipped", "RuntimeError: not here")
    ]
    assert _figures(ModelProvider("absent", train, masked=False), case) == [
        (STEP, "skipped", "RuntimeError: not here")
    ]


@pytest.mark.parametrize("name", SMALL)
def test_every_provider_has_its_figures(name):
    for provider in EAGER:
        found = _figures(provider, ModelCase(name, 8, "fp32"))
        assert [figure[:2] for figure in found] == FIGURES, found
        assert found[0][2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in MODEL_PROVIDERS if one.compiled])
@pytest.mark.parametrize("model", ["linear-64", "lenet-5"])
def test_compiled_providers_pass(model, name):
    (provider,) = providers_for("model", [name])
    found = _figures(provider, ModelCase(model, 8, "fp32"))
    assert [figure[:2] for figure in found] == FIGURES, found


@pytest.mark.parametrize(
    ("name", "unit", "units"), [("vit-small", "images/s", 8), ("gpt-small", "tokens/s", 8 * 16)]
)
def test_throughput_is_of_images_or_tokens(name, unit, units):
    figures = {}
    (dense,) = providers_for("model", ["dense"])
    load(ModelCase(name, 8, "fp32"), CPU)(
        dense, lambda _, metric, *value: figures.update({metric: value})
    )
    seconds, _ = figures["time"]
    assert figures["throughput"] == (pytest.approx(units / seconds), unit)


def test_a_network_of_torchvision_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (dense,) = providers_for("model", ["dense"])
    ((_, metric, reason),) = _figures(dense, ModelCase("resnet-small", 8, "fp32"))
    assert metric == "skipped" and "pip install -e '.[bench]'" in reason


def test_launches_are_what_the_device_did():
    kinds = ("kernel", "gpu_memcpy", "kernel", "gpu_memset", "gpu_user_annotation", "cuda_runtime")
    events = [{"cat": kind, "name": "x"} for kind in kinds] + [{"ph": "M", "name": "process_name"}]
    assert launches_in({"traceEvents": events}) == 4


@pytest.mark.parametrize(
    "case",
    [
        ModelCase("lenet-300-100", 64, "fp32"),
        ModelCase("wrn-28-8", 128, "bf16-autocast", 0.25),
        ListCase("4x4096x4096", "bf16-autocast"),
        Case("masked_weight", 0, 8, 16, "bf16"),
        Case("linear", 4, 8, 16, "bf16-autocast", 0.5),
    ],
)
def test_a_case_is_found_again_from_its_columns(case):
    assert case_of(case.name, *case.sizes, case.dtype, f"{case.remaining_ratio:g}") == case


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ModelCase, ("vgg-11", 8, "fp32"), "model 'vgg-11' is unknown. Accepted: lenet-300-100"),
        (ModelCase, ("gpt", 0, "fp32"), "batch is 0. Accepted: a positive number"),
        (ModelCase, ("gpt", 8, "int8"), "dtype 'int8' is unknown"),
        (ListCase, ("vgg", "fp32"), "weights 'vgg' is unknown. Accepted: 4x4096x4096"),
        (ListCase, ("small", "fp32", 0.0), r"remaining_ratio is 0\.0"),
    ],
)
def test_cases_that_make_no_sense(kind, arguments, message):
    with pytest.raises(UsageError, match=message):
        kind(*arguments)
