"""What the benchmark does only where there is a GPU: graphs of whole steps, launches, memory."""

from __future__ import annotations

import pytest
import torch

from bench.cases import ConvCase, LinearCase, ModelCase, WeightsCase
from bench.contenders import contenders_for
from bench.measure.run import measure
from bench.measure.timing import _capture, count_launches, graph_time, one_stream, replayed
from bench.measure.verify import Expectation
from bench.networks import MODELS

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SMALL = sorted({about.small or name for name, about in MODELS.items()} - {"lstm-small"})


@pytest.mark.parametrize("name", SMALL)
def test_right_contenders_pass_eagerly_and_as_a_graph(name):
    expectation = Expectation(ModelCase(name, 16), CUDA)
    for contender in contenders_for(expectation.case, compiled=False):
        if contender.graphable:
            expectation.verified(contender)
            expectation.verify_graph(contender)


def test_replays_go_on_where_eager_calls_ended_also_after_a_capture_that_failed():
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


@pytest.mark.parametrize("alone", [False, True])
def test_captured_calls_are_timed_again_and_again(alone):
    count = torch.zeros((), device=CUDA)
    assert 0 < graph_time(lambda: count.add_(1), alone).median < 1e-3
    assert count > 100


def test_launches_are_counted():
    one = torch.ones(8, device=CUDA)
    assert count_launches(lambda: ((one + one).mul_(2).neg_(), one.to("cpu"))) == 4


CASES = [ConvCase(4, 8, 64, 64, 3), ConvCase(4, 9, 64, 32, 1, 2), LinearCase(256, 256, 128)]
CASES += [ConvCase(4, 9, 32, 32, 7, groups=32), ModelCase("vgg-small", 16), WeightsCase("small")]
RATES = {"linear": {"flops", "bandwidth"}, "conv": {"flops", "bandwidth"}}
RATES |= {"weights": {"bandwidth"}, "model": {"bandwidth"}, "step": {"throughput"}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_pass_of_every_contender_has_its_figures(case):
    expectation = Expectation(case, CUDA)
    for contender in contenders_for(case, compiled=False):
        found = []
        measure(contender, expectation, lambda *figure, found=found: found.append(figure[:3]))
        if contender.name in ("fused", "mixed") and found[0][:2] == ("", "skipped"):
            continue  # not every convolution has fused products
        for name in contender.passes:
            metrics = {metric for where, metric, _ in found if where == name} - {"saved"}
            expected = {"time", "spread", "memory", *RATES.get(name, RATES[case.op])}
            expected |= {"launches" if case.op == "model" else "host_time"}
            if contender.graphable:
                expected |= {"graph_time"} | ({"graph_throughput"} if name == "step" else set())
            assert metrics == expected, (contender.name, name, found)
