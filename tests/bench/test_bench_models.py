"""Whole models: their sizes, the same start for everybody, no time for wrong trainings."""

from __future__ import annotations

import pytest
import torch

import dst_kernels
from bench.cases import FP64, MODES, ModelCase
from bench.contenders import CONTENDERS, REFERENCES, Contender, authors, problem_of
from bench.contenders.models import Training
from bench.measure.verify import Expectation
from bench.measure.work import rates
from bench.networks import MODELS, SGD
from bench.results import UsageError, WrongResultError

CPU = torch.device("cpu")
BY_NAME = {contender.name: contender for contender in CONTENDERS["model"]}
SMALL = sorted({about.small or name for name, about in MODELS.items()})

# Parameters, masked weights, thresholds: those of the paper and of the published networks.
SIZES = {"lenet-300-100": (266_610, 266_200, 410), "lenet-5": (431_080, 430_500, 580)}
SIZES |= {"vgg-16": (14_987_722, 14_977_728, 4_746), "wrn-28-8": (23_354_842, 23_340_464, 8_090)}
SIZES |= {"resnet-50": (25_557_032, 25_502_912, 27_560)}
SIZES |= {"convnext-t": (28_589_128, 28_524_000, 42_184)}
SIZES |= {"vit-b-16": (86_567_656, 57_980_928, 47_848)}
SIZES |= {"gpt": (124_439_808, 84_934_656, 82_944), "lstm-a": (214_282, 212_224, 2_058)}


def _expectation(name, dtype="fp32", batch=4):
    return Expectation(ModelCase(name, batch, dtype=dtype), CPU)


def _modules(name):
    with torch.device("meta"):
        return MODELS[name].network()


@pytest.mark.parametrize("name", MODELS)
def test_everybody_masks_the_same_layers_and_sizes_are_the_published_ones(name):
    converters = [dst_kernels.sparsify_]
    if "lstm" in name:
        with pytest.raises(TypeError, match="no recurrent layers"):
            authors.convert_(_modules(name))
    else:
        converters += [authors.convert_, authors.convert_branch_free_]
    masked = []
    for convert_ in converters:
        model = convert_(_modules(name))
        thresholds = {key: p for key, p in model.named_parameters() if "threshold" in key}
        weights = [model.get_parameter(key.replace("threshold", "weight")) for key in thresholds]
        groups = model.parameters(), weights, thresholds.values()
        every, *sizes = (sum(p.numel() for p in group) for group in groups)
        masked.append((sorted(thresholds), (every - sizes[1], *sizes)))  # parameters when dense
    assert masked[0][0] and all(one == masked[0] for one in masked)
    assert masked[0][1] == SIZES.get(name, masked[0][1])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_small_one_of_its_kind(name):
    model = MODELS[name]
    small = MODELS[model.small or name]
    assert small.small is None and small.unit == model.unit
    assert (small.optimizer, small.loss) == (model.optimizer, model.loss)
    kinds, small_kinds = (
        {type(module) for module in _modules(each).modules() if not any(module.children())}
        for each in (name, model.small or name)
    )
    assert kinds == small_kinds


@pytest.mark.parametrize("name", ["lenet-300-100", "gpt-small", "linear-64"])
def test_everybody_starts_from_the_same_and_a_timed_step_leaves_it_so(name):
    setup, starts = problem_of(ModelCase(name, 4), CPU), []
    for contender in CONTENDERS["model"]:
        if contender.masked and not contender.compiled:
            training = contender.make(setup)
            starts.append(training._parameters())
            training.step(), training.step()
            torch.testing.assert_close(training._parameters(), starts[0], rtol=0, atol=0)
    assert len(starts) == 4 and all(start.keys() == starts[0].keys() for start in starts)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * one.compiled) for n, one in BY_NAME.items()]
)
def test_every_contender_does_what_the_reference_does(name):
    work = _expectation("lenet-300-100", "bf16-autocast").verified(BY_NAME[name])
    assert work.step().isfinite()


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_network_is_trained_right_and_no_layer_collapses(name):
    expectation = _expectation(name)
    for contender in ("deferred", "grouped", *["dst_eager"] * ("lstm" not in name)):
        expectation.verified(BY_NAME[contender])
    training = REFERENCES["model"].make(expectation.problem.small(FP64))
    training.results()  # a reset would be committed at different times by different contenders
    layers = [module for module in training.model.modules() if hasattr(module, "remaining_ratio")]
    assert layers and min(layer.remaining_ratio() for layer in layers) > 0.1


def _training(penalty=authors.authors_regularization, decay=False, momentum=None, **factors):
    """Return the authors' layers with torch's optimizer; factors are of the recipe's numbers."""

    def groups(model):
        others, thresholds = authors.parameter_groups(model)
        return [others, {"params": thresholds["params"]} if decay else thresholds]

    def make(setup):
        setup.recipe = {key: by * factors.get(key, 1) for key, by in setup.recipe.items()}
        training = Training(setup, authors.convert_, groups, penalty)
        for group in training._optimizer.param_groups if momentum is not None else ():
            group["momentum"] = momentum
        return training

    return Contender("wrong", make, ("step",))


MISTAKES = {"other rate": {"lr": 1.1}, "no weight decay": {"weight_decay": 0.0}}
MISTAKES |= {"thresholds decay": {"decay": True}, "weaker regulariser": {"alpha": 0.5}}
MISTAKES |= {"no regulariser": {"penalty": None}, "no momentum": {"momentum": 0.0}}


@pytest.mark.parametrize("name", ["lenet-300-100", "linear-64"])
@pytest.mark.parametrize("mode", [FP64, MODES["fp32"]], ids=["fp64", "fp32"])
def test_a_training_with_another_recipe_is_found_in_every_mode(name, mode):
    expectation = _expectation(name)
    expectation._check_training(_training(), mode)
    for mistake, changes in MISTAKES.items():
        if mistake != "no momentum" or MODELS[name].optimizer == SGD:
            with pytest.raises(WrongResultError, match=r"after a few steps in .*: error"):
                expectation._check_training(_training(**changes), mode)
                pytest.fail(f"{mistake} is not noticed")


def test_a_wrong_training_is_not_timed():
    with pytest.raises(WrongResultError, match="losses after a few steps in fp64: error"):
        _expectation("linear-64").verified(_training(penalty=None))


def test_throughput_is_of_images_or_tokens_and_an_optimizer_has_a_bandwidth():
    def found(name, contender, step):
        case = ModelCase(name, 8)
        work = BY_NAME[contender].make(problem_of(case, CPU))
        return list(rates(case, step, work.prepare(step)))

    assert found("vit-small", "dense", "step") == [("throughput", 8, "images/s")]
    assert found("gpt-small", "dense", "step") == [("throughput", 8 * 16, "tokens/s")]
    # AdamW reads and writes the parameter and two states, and reads the gradient, if there is one:
    # in the compute dtype for a packed weight, whose next masked copy it writes.
    dense, weight, threshold = 6 * 4 + 4, 6 * 4 + 2 + 2, 6 * 4
    moved = 48 * 64 * dense + 48 * dense
    assert found("linear-64", "dense", "optimizer") == [("bandwidth", moved, "B/s")]
    moved = 48 * 64 * weight + 48 * dense + 48 * threshold
    assert found("linear-64", "deferred", "optimizer") == [("bandwidth", moved, "B/s")]


def test_a_model_that_is_none():
    with pytest.raises(UsageError, match=r"model 'vgg-11' is unknown. Accepted: lenet-300-100"):
        problem_of(ModelCase("vgg-11", 8), CPU)
