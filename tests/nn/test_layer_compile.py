"""torch.compile: no graph breaks, and the eager trajectory over a guard reset."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from layer_cases import CASES, GRANULARITIES
from torch import nn

from dst_kernels.nn import MaskedConv2d, MaskedLinear
from tests.ops.authors import regularizer


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, step_model, inputs, *, reset_at):
    """SGD with momentum and the regulariser; thresholds collapse before step `reset_at`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step, input in enumerate(inputs):
        if step == reset_at:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("threshold"):
                        parameter.fill_(10.0)
        optimizer.zero_grad()
        penalty = regularizer(p for n, p in model.named_parameters() if n.endswith("threshold"))
        loss = step_model(input).square().mean() + 0.02 * penalty
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_trajectory(model, inputs, *, backend, tolerance):
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = train(eager, eager, inputs, reset_at=3)
    actual = train(model, compiled, inputs, reset_at=3)
    torch.testing.assert_close(actual, expected, **tolerance)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name, **tolerance)
        if name.endswith("threshold"):
            assert parameter.abs().max() < 1, "the reset happened"
    model.eval(), eager.eval()
    torch.testing.assert_close(compiled(inputs[0]), eager(inputs[0]), **tolerance)


def test_the_product_in_a_graph_is_that_of_torch():
    """Which the compiler can tune and give an epilogue."""
    recorder = torch._dynamo.testing.EagerAndRecordGraphs()
    torch.compile(MaskedLinear(4, 3), backend=recorder, fullgraph=True)(torch.ones(2, 4))
    targets = [node.target for graph in recorder.graphs for node in graph.graph.nodes]
    assert torch._C._nn.linear in targets


def test_a_product_that_eager_mode_gives_to_another_library():
    layer, input = MaskedLinear(512, 512), torch.randn(16, 512)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))


# Every layer, and every granularity with a linear layer, a convolution and a transposed one.
GRANULARITY = dict(zip(CASES, itertools.cycle(GRANULARITIES)))
PAIRS = [*GRANULARITY.items(), *itertools.product([CASES[0], CASES[2], CASES[5]], GRANULARITIES)]


@pytest.mark.parametrize(
    ("case", "granularity"),
    dict.fromkeys(PAIRS),
    ids=lambda value: value if isinstance(value, str) else value.masked.__name__,
)
def test_trajectory_and_no_graph_breaks(case, granularity):
    torch.manual_seed(0)
    layer = case.masked(*case.args, granularity=granularity)
    inputs = [torch.randn(case.input_shape) for _ in range(6)]
    assert_same_trajectory(
        layer, inputs, backend="aot_eager", tolerance={"rtol": 1e-5, "atol": 1e-6}
    )


@pytest.mark.slow
def test_trajectory_under_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedConv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), MaskedLinear(6 * 25, 4)
    )
    inputs = [torch.randn(4, 3, 5, 5) for _ in range(6)]
    assert_same_trajectory(
        model, inputs, backend="inductor", tolerance={"rtol": 1e-4, "atol": 1e-5}
    )


@pytest.mark.parametrize("case", CASES[::5], ids=["linear", "conv_transpose2d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fullgraph_without_gradients(case, training):
    layer = case.masked(*case.args).train(training)
    layer.reset_threshold(10.0)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(case.input()), layer(case.input()))
    twin = compiled._orig_mod
    assert torch.equal(twin.threshold, layer.threshold)
    assert torch.count_nonzero(twin.threshold) == (0 if training else twin.threshold.numel())


def test_another_batch_size_does_not_compile_again():
    case = CASES[2]
    layer = case.masked(*case.args)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch in (3, 5, 8):
        input = torch.randn(batch, *case.input_shape[1:])
        torch.testing.assert_close(compiled(input), layer(input), rtol=1e-5, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("case", CASES[:3:2], ids=["linear", "conv2d"])
def test_autocast_inside_the_compiled_region(case):
    layer = case.masked(*case.args)
    layer.reset_threshold(0.1)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = layer(case.input()), compiled(case.input())
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    expected.float().sum().backward(), actual.float().sum().backward()
    torch.testing.assert_close(twin.threshold.grad, layer.threshold.grad, rtol=1e-2, atol=1e-2)
    assert twin.weight.grad.dtype == torch.float32 and torch.count_nonzero(twin.threshold.grad)
