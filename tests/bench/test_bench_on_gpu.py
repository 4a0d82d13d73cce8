"""What the benchmark does only where there is a GPU: graphs of whole steps, launches, memory."""

from __future__ import annotations

import pytest
import torch

from bench.cases import ConvCase, ListCase, ModelCase
from bench.kinds import load, providers_for
from bench.launches import count_launches
from bench.list_providers import LIST_PASSES
from bench.model_providers import MODEL_PROVIDERS, STEP
from bench.models import MODELS
from bench.modes import MODES
from bench.timing import _capture, graph_time, one_stream, replayed
from bench.training import LEARNING, Setup
from bench.trajectory import TrajectoryExpectation

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MASKED = [one for one in MODEL_PROVIDERS if one.masked and one.graphable and not one.compiled]


def _setup(model):
    mode = MODES["bf16-autocast"]
    return Setup(model, 16, 0.5, CUDA, mode, LEARNING[MODELS[model].optimizer])


@pytest.mark.parametrize(
    "name",
    [
        "lenet-300-100",
        "vgg-small",
        "wrn-small",
        "resnet-small",
        "convnext-small",
        "vit-small",
        "gpt-small",
    ],
)
def test_right_providers_pass_eagerly_and_as_a_graph(name):
    expectation = TrajectoryExpectation(_setup(name))
    for provider in MASKED:
        expectation.verify(provider)
        expectation.verify_graph(provider)


def test_replays_go_on_where_eager_calls_ended():
    total = torch.zeros((), device=CUDA)
    assert [int(value) for value in replayed(lambda: total.add_(1), 2, 3)] == [1, 2, 3, 4, 5]


def test_one_stream_is_the_same_inside_another():
    before = torch.cuda.current_stream()
    with one_stream(CUDA):
        outer = torch.cuda.current_stream()
        with one_stream(CUDA):
            assert torch.cuda.current_stream() == outer != before
    assert torch.cuda.current_stream() == before


def test_one_captured_call_is_timed_again_and_again():
    count = torch.zeros((), device=CUDA)
    assert 0 < graph_time(lambda: count.add_(1), most=1).median < 1e-3
    assert count > 100


def test_after_a_capture_that_failed_all_goes_on_as_before():
    count = torch.zeros((), device=CUDA)

    with one_stream(CUDA), pytest.raises(RuntimeError):
        _capture(lambda: count.add_(1).item(), 1)
    torch.cuda.empty_cache()  # raises as long as a capture goes on
    assert graph_time(lambda: count.add_(1)).median > 0


def test_launches_are_counted():
    one, two = torch.zeros(8, device=CUDA), torch.ones(8, device=CUDA)

    def three_kernels_and_a_copy():
        (one + two).mul_(2).neg_()
        two.to("cpu")

    assert count_launches(three_kernels_and_a_copy, CUDA) == 4


def test_every_provider_has_its_figures():
    case = ModelCase("vgg-small", 16, "bf16-autocast")
    measure = load(case, CUDA)
    for provider in providers_for("model"):
        if provider.compiled:
            continue
        found = []
        measure(provider, lambda *figure, found=found: found.append(figure[:2]))
        metrics = ["time", "spread", "throughput", "memory", "launches"]
        metrics += ["graph_time", "graph_throughput"] * provider.graphable
        assert found == [(STEP, metric) for metric in metrics], provider.name


@pytest.mark.parametrize(
    "case",
    [
        ConvCase(4, 8, 64, 64, 3, "bf16-autocast"),
        ConvCase(4, 9, 64, 32, 1, "bf16-autocast", stride=2),
        ConvCase(4, 9, 32, 32, 7, "bf16-autocast", groups=32),
    ],
    ids=lambda case: case.name,
)
def test_every_pass_of_a_convolution_has_its_figures(case):
    measure = load(case, CUDA)
    for provider in providers_for("conv"):
        if provider.compiled:
            continue
        found = []
        measure(provider, lambda *figure, found=found: found.append(figure[:3]))
        if provider.name in ("fused", "mixed") and found[0][:2] == ("", "skipped"):
            continue  # not every convolution has fused products
        for name in provider.passes:
            metrics = {metric for where, metric, _ in found if where == name}
            assert {"time", "flops", "memory"} <= metrics, (provider.name, name, found)
            assert "error" not in metrics


def test_every_pass_over_a_list_has_its_figures():
    measure = load(ListCase("small", "bf16-autocast"), CUDA)
    for provider in providers_for("weights"):
        found = []
        measure(provider, lambda *figure, found=found: found.append(figure[:2]))
        metrics = ("time", "spread", "graph_time", "bandwidth")
        assert found == [(name, metric) for name in LIST_PASSES for metric in metrics]
