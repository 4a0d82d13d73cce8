"""The collapse guard: a training forward commits the reset, an eval forward changes nothing."""

from __future__ import annotations

import copy
import itertools

import torch
from layer_cases import CASES, GRANULARITIES, collapsing, every_layer, threshold_of_each_weight
from torch.utils.checkpoint import checkpoint

from dst_kernels.nn import MaskedLinear
from tests.ops import authors


@every_layer
def test_training_forward_commits(case):
    for granularity, grad in itertools.product(GRANULARITIES, (True, False)):
        layer = collapsing(case.masked(*case.args, granularity=granularity))
        threshold, weight = layer.threshold, layer.weight.clone()
        with torch.set_grad_enabled(grad):
            output = layer(case.input())
        assert torch.equal(output, layer.to_dense()(case.input()))
        assert layer.threshold is threshold and torch.count_nonzero(threshold) == 0
        assert torch.equal(layer.weight, weight) and layer.remaining_ratio() == 1
        assert output.requires_grad == grad


@every_layer
def test_eval_forward_uses_the_effective_threshold_and_changes_nothing(case):
    for granularity, grad in itertools.product(GRANULARITIES, (True, False)):
        layer = collapsing(case.masked(*case.args, granularity=granularity)).eval()
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        versions = {name: parameter._version for name, parameter in layer.named_parameters()}
        with torch.set_grad_enabled(grad):
            output = layer(case.input())
        dense = case.dense(*case.args)
        dense.load_state_dict({name: before[name] for name in ("weight", "bias")})
        assert torch.equal(output, dense(case.input()))
        assert layer.mask().all() and layer.remaining_ratio() == 1
        for name, value in before.items():
            assert torch.equal(layer.state_dict()[name], value), name
        assert versions == {name: p._version for name, p in layer.named_parameters()}


def test_boundary_is_inclusive():
    """Ratio <= reset_ratio resets; one weight more does not."""
    for kept, resets in ((0, True), (9, True), (10, True), (11, False), (500, False)):
        layer = MaskedLinear(100, 10, reset_ratio=0.01)
        with torch.no_grad():
            layer.weight.fill_(0.1).view(-1)[:kept] = 1.0
            layer.threshold.fill_(0.5)
        layer(torch.randn(2, 100))
        expected = 0.0 if resets else 0.5
        assert torch.equal(layer.threshold, torch.full((10,), expected)), kept
        assert layer.mask().sum() == (1000 if resets else kept)


def test_guard_off():
    for case in CASES:
        layer = collapsing(case.masked(*case.args, reset_ratio=None))
        output = layer(case.input())
        assert torch.equal(layer.threshold, torch.full_like(layer.threshold, 10.0))
        assert layer.remaining_ratio() == 0
        channels = -1 if isinstance(layer, MaskedLinear) else 1
        for channel, bias in enumerate(layer.bias):
            assert bool((output.select(channels, channel) == bias).all())


def test_a_reset_is_for_the_whole_layer_or_not_at_all():
    for case in CASES:
        layer = case.masked(*case.args)
        with torch.no_grad():
            layer.threshold.fill_(10.0)[0] = -1.0  # one row stays: far more than 1 %
        before = layer.threshold.clone()
        layer(case.input())
        assert torch.equal(layer.threshold, before)
        assert torch.equal(layer.mask(), threshold_of_each_weight(layer) < 0)


def test_gradients_of_a_step_with_a_reset_are_those_at_zero():
    torch.manual_seed(0)
    layer = collapsing(MaskedLinear(6, 5, dtype=torch.float64))
    input = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    output = layer(input)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected = (
        *authors.gradients(grad.t() @ input, layer.weight, torch.zeros(5)),
        grad @ layer.weight,
    )
    actual = (layer.weight.grad, layer.threshold.grad, input.grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_layer_used_twice_then_backward():
    """The first use is computed at t_eff = 0 of a reset, the second at the committed 0."""
    torch.manual_seed(0)
    layer = collapsing(MaskedLinear(5, 5, dtype=torch.float64))
    at_zero = copy.deepcopy(layer)
    at_zero.reset_threshold()
    input = torch.randn(3, 5, dtype=torch.float64)
    for module in (layer, at_zero):
        module(module(input).relu()).square().sum().backward()
    assert torch.count_nonzero(layer.threshold) == 0
    for name, parameter in at_zero.named_parameters():
        assert torch.equal(layer.get_parameter(name).grad, parameter.grad), name


def test_two_forwards_before_one_backward():
    torch.manual_seed(0)
    layer = MaskedLinear(6, 5, dtype=torch.float64)
    layer.reset_threshold(0.2)
    first, second = torch.randn(2, 4, 6, dtype=torch.float64)
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    other.reset_threshold()
    expected = one(first).sum(), other(second).sum()
    actual_first = layer(first).sum()
    with torch.no_grad():
        layer.threshold.fill_(10.0)  # as an optimizer step would; the next forward resets it
    actual_second = layer(second).sum()
    assert torch.count_nonzero(layer.threshold) == 0
    (actual_first + actual_second).backward()
    for value in expected:
        value.backward()
    assert torch.equal(actual_first, expected[0]) and torch.equal(actual_second, expected[1])
    for name, parameter in layer.named_parameters():
        wanted = one.get_parameter(name).grad + other.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-12, atol=1e-12, msg=name)


@every_layer
def test_activation_checkpointing_over_a_reset(case):
    for use_reentrant in (True, False):
        torch.manual_seed(0)
        plain = collapsing(case.masked(*case.args))
        stored = copy.deepcopy(plain)
        inputs = [case.input().requires_grad_() for _ in range(2)]
        expected = plain(inputs[0]).tanh()
        actual = checkpoint(stored, inputs[1], use_reentrant=use_reentrant).tanh()
        assert torch.equal(actual, expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for name, parameter in plain.named_parameters():
            assert torch.equal(stored.get_parameter(name).grad, parameter.grad), name
            assert torch.equal(stored.get_parameter(name), parameter), name


def test_double_precision_and_frozen_thresholds_reset_too():
    for case in CASES:
        layer = collapsing(case.masked(*case.args, dtype=torch.float64))
        layer.threshold.requires_grad_(False)
        layer(case.input(torch.float64)).sum().backward()
        assert torch.count_nonzero(layer.threshold) == 0 and layer.threshold.grad is None
        assert layer.weight.grad is not None


def test_a_diverged_layer_is_not_hidden():
    """NaN in a weight or a threshold reaches the output and survives the guard."""
    for name in ("weight", "threshold"):
        layer = collapsing(MaskedLinear(4, 3))
        with torch.no_grad():
            layer.get_parameter(name).view(-1)[0] = float("nan")
        assert layer(torch.randn(2, 4)).isnan().any(), name


def test_momentum_survives_a_reset():
    """As in the authors' code: the reset writes the value, the optimizer's buffer goes on."""
    layer = MaskedLinear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    buffer = optimizer.state[layer.threshold]["momentum_buffer"].clone()
    collapsing(layer)(torch.randn(8, 4))
    assert torch.equal(optimizer.state[layer.threshold]["momentum_buffer"], buffer)
    layer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.threshold.detach(), -0.1 * 0.9 * buffer)
