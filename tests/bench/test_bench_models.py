"""Whole models: their sizes, the same start for everybody, no time for wrong trainings."""

import pytest
import torch
from made_up_rows import CPU

from bench.cases import FP64, MODES, ModelCase
from bench.contenders import CONTENDERS, REFERENCES, Contender, authors, problem_of
from bench.contenders.models import Training, masked
from bench.contenders.work import rates
from bench.measure.timing import _capture, count_launches, graph_time, one_stream, replayed
from bench.measure.verify import Expectation
from bench.networks import MODELS, SGD
from bench.results import WrongResultError

BY_NAME = {contender.name: contender for contender in CONTENDERS["model"]}
CUDA, SMALL = torch.device("cuda"), sorted({about.small or name for name, about in MODELS.items()})

# Parameters, masked weights, thresholds: those of the paper and of the published networks.
SIZES = {"lenet-300-100": (266_610, 266_200, 410), "lenet-5": (431_080, 430_500, 580)}
SIZES |= {"vgg-16": (14_987_722, 14_977_728, 4_746), "wrn-28-8": (23_354_842, 23_340_464, 8_090)}
SIZES |= {"resnet-50": (25_557_032, 25_502_912, 27_560)}
SIZES |= {"convnext-t": (28_589_128, 28_524_000, 42_184)}
SIZES |= {"vit-b-16": (86_567_656, 57_980_928, 47_848)}
SIZES |= {"gpt": (124_439_808, 84_934_656, 82_944), "lstm-a": (214_282, 212_224, 2_058)}


def _modules(name):
    with torch.device("meta"):
        return MODELS[name].network()


@pytest.mark.parametrize("name", MODELS)
def test_everybody_masks_the_same_layers_and_sizes_are_the_published_ones(name):
    converters = [masked, authors.convert_, authors.convert_branch_free_]
    if "lstm" in name:
        with pytest.raises(TypeError, match="no recurrent layers"):
            authors.convert_(_modules(name))
        del converters[1:]
    found = []
    for convert_ in converters:
        model = convert_(_modules(name))
        thresholds = {key: p for key, p in model.named_parameters() if "threshold" in key}
        weights = [model.get_parameter(key.replace("threshold", "weight")) for key in thresholds]
        groups = model.parameters(), weights, thresholds.values()
        every, *sizes = (sum(p.numel() for p in group) for group in groups)
        found.append((sorted(thresholds), (every - sizes[1], *sizes)))  # parameters when dense
    names_there, sizes = found[0]
    assert names_there and found == found[:1] * len(found) and sizes == SIZES.get(name, sizes)
    # Each has a small one of its kind.
    names = name, MODELS[name].small or name
    about = [(one.unit, one.optimizer, one.loss) for one in map(MODELS.get, names)]
    modules = (_modules(each).modules() for each in names)
    kinds = [{type(one) for one in some if not any(one.children())} for some in modules]
    assert MODELS[names[1]].small is None and (about[0], kinds[0]) == (about[1], kinds[1])


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
    expectation = Expectation(ModelCase("lenet-300-100", 4), CPU)
    assert expectation.verified(BY_NAME[name]).step().isfinite()


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_network_is_trained_right_and_no_layer_collapses(name):
    expectation = Expectation(ModelCase(name, 4, dtype="fp32"), CPU)
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
    expectation = Expectation(ModelCase(name, 4, dtype="fp32"), CPU)
    expectation._check_training(_training(), mode)
    for mistake, changes in MISTAKES.items():
        if mistake != "no momentum" or MODELS[name].optimizer == SGD:
            with pytest.raises(WrongResultError, match=r"after a few steps in .*: error"):
                expectation._check_training(_training(**changes), mode)
                pytest.fail(f"{mistake} is not noticed")
    with pytest.raises(WrongResultError, match="losses after a few steps in fp64: error"):
        expectation.verified(_training(penalty=None))


def test_throughput_is_of_images_or_tokens_and_an_optimizer_has_a_bandwidth():
    # AdamW reads and writes the parameter and two states, and reads the gradient, if there is one:
    # in the compute dtype for a packed weight, whose next masked copy it writes.
    dense, weight, threshold = 6 * 4 + 4, 6 * 4 + 2 + 2, 6 * 4
    moved = 48 * 64 * weight + 48 * dense + 48 * threshold
    for name, contender, step, *expected in (
        ("vit-small", "dense", "step", "throughput", 8, "images/s"),
        ("gpt-small", "dense", "step", "throughput", 8 * 16, "tokens/s"),
        ("linear-64", "dense", "optimizer", "bandwidth", 48 * 64 * dense + 48 * dense, "B/s"),
        ("linear-64", "deferred", "optimizer", "bandwidth", moved, "B/s"),
    ):
        work = BY_NAME[contender].make(problem_of(case := ModelCase(name, 8), CPU))
        assert [*rates(case, step, work.prepare(step))] == [tuple(expected)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*SMALL} - {"lstm-small"}))
def test_right_contenders_pass_eagerly_and_as_a_graph(name):
    expectation = Expectation(ModelCase(name, 16), CUDA)
    for contender in CONTENDERS["model"]:
        if contender.graphable and not contender.compiled:
            expectation.verified(contender)
            expectation.verify_graph(contender)


@pytest.mark.gpu
def test_captures_go_on_where_eager_calls_ended_are_timed_and_their_launches_counted():
    total, before = torch.zeros((), device=CUDA), torch.cuda.current_stream()
    with one_stream(CUDA):
        outer = torch.cuda.current_stream()
        with one_stream(CUDA), pytest.raises(RuntimeError):
            assert torch.cuda.current_stream() == outer != before
            _capture(lambda: total.add_(1).item(), 1)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()  # raises as long as a capture goes on
    total.zero_()
    assert [int(value) for value in replayed(lambda: total.add_(1), 2, 3)] == [1, 2, 3, 4, 5]
    for alone in (False, True):
        count = torch.zeros((), device=CUDA)
        assert 0 < graph_time(lambda count=count: count.add_(1), alone).median < 1e-3
        assert count > 100
    one = torch.ones(8, device=CUDA)
    assert count_launches(lambda: ((one + one).mul_(2).neg_(), one.to("cpu"))) == 4
