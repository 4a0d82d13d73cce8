"""Parameters that take the place of those a deferred optimizer has; and compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import conv2d, linear, with_dense_layers
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from twins import Twins, assert_close, batches, masked_layers

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD

OPTIONS = {"lr": 0.1, "momentum": 0.9, "alpha": 0.05}


@pytest.fixture
def backend(best_backend):
    return best_backend


def trained(backend, network=linear, steps=3):
    model, shape = network(backend=backend)
    twins = Twins(model, backend=backend, **OPTIONS)
    data = batches(shape)
    twins.train(data, steps)
    twins.assert_same(data[0][0])
    return twins, data


def go_on(twins, data):
    twins.train(data, 3)
    twins.assert_same(data[0][0])


def swapped(model):
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("network", [linear, conv2d])
def test_functional_call_has_gradients_of_its_own(network, backend):
    """They belong to tensors that the optimizer does not know: dW and dt, as without it."""
    twins, data = trained(backend, network)
    input, target = data[0]
    found = []
    for side in twins.sides:
        parameters = swapped(twins.theirs.model)
        output = functional_call(side.model, parameters, (input,))
        nn.functional.cross_entropy(output, target).backward()
        found.append({name: p.grad for name, p in parameters.items()})
    for name, grad in found[0].items():
        assert_close(grad, found[1][name], name)
    go_on(twins, data)


def test_torch_func_has_gradients_of_its_own(backend):
    twins, data = trained(backend)
    input, target = data[0]

    def gradients(side):
        def loss(parameters):
            output = functional_call(side.model, parameters, (input,))
            return nn.functional.cross_entropy(output, target)

        return torch.func.grad(loss)(dict(twins.theirs.model.named_parameters()))

    ours, theirs = twins.both(gradients)
    for name, grad in ours.items():
        assert_close(grad, theirs[name], name)
    go_on(twins, data)


def test_replicas_hand_gradients_on(backend):
    """DataParallel's, here made by hand: what reaches the weight is G, as from the layer itself."""
    layer = MaskedLinear(6, 4, backend=backend).double()
    optimizer = DSTSGD(layer, lr=0.1, backend=backend)
    input = torch.randn(3, 6, dtype=torch.float64)
    layer(input).square().sum().backward()
    expected = layer.weight.grad
    optimizer.zero_grad()
    replica = layer._replicate_for_data_parallel()
    for name in ("weight", "threshold", "bias"):
        setattr(replica, name, getattr(layer, name).clone())
    replica.forward(input).square().sum().backward()
    assert_close(layer.weight.grad, expected, "G")
    assert layer.threshold.grad is None


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


@pytest.mark.parametrize("when", ["before", "between steps"])
def test_parametrizations(when, backend):
    """What a layer computes its weight from gets gradients of its own, by the usual rules."""
    model, shape = linear(backend=backend)
    if when == "before":
        parametrize.register_parametrization(model[2], "weight", Halved())
    twins, data = Twins(model, backend=backend, **OPTIONS), batches(shape)
    twins.train(data, 3)
    if when != "before":
        for side in twins.sides:
            parametrize.register_parametrization(side.model[2], "weight", Halved())
    twins.train(data, 4)
    twins.assert_same(data[0][0])
    assert twins.ours.model[0].threshold.grad is None


@pytest.mark.parametrize("name", ["weight", "threshold"])
def test_parameters_replaced_by_new_ones(name, backend):
    """Neither optimizer has them, so they stay; the other of the pair goes on."""
    twins, data = trained(backend)
    for side in twins.sides:
        layer = masked_layers(side.model)[1]
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 0.5))
    kept = getattr(masked_layers(twins.ours.model)[1], name)
    before = kept.detach().clone()
    alphas = [0.05, 0.05]
    for input, target in data:
        for side in twins.sides:
            side.optimizer.zero_grad()
            (side.loss(input, target) + side.regularizer(alphas)).backward()
            side.optimizer.step()
    twins.both(lambda side: side.model(data[0][0]))
    if name == "weight":  # a threshold of which only the forward knows is reset by it
        assert torch.equal(kept, before)
    for p, q in zip(*(side.model.parameters() for side in twins.sides), strict=True):
        assert_close(p, q, name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_compiled_models(how, backend):
    """Their layers mask their own weights; the step is the same."""
    model, shape = with_dense_layers(backend=backend)
    twins, data = Twins(model, backend=backend, **OPTIONS), batches(shape)
    if how == "compile()":
        model.compile(backend="aot_eager")
    else:
        twins.ours.model = torch.compile(model, backend="aot_eager")
    for i in range(6):
        if i == 3:
            for each in (model, twins.theirs.model):
                each[-1].reset_threshold(3.0)
        twins.step(*data[i % 4])
    twins.ours.model(data[0][0]), twins.theirs.model(data[0][0])
    for p, q in zip(model.parameters(), twins.theirs.model.parameters(), strict=True):
        assert_close(p, q, "parameters")
    assert model[0].threshold.grad is None


def test_nan_goes_where_it_goes_without_us(backend):
    """A diverged weight stays visible: NaN is never pruned away."""
    twins, data = trained(backend)
    twins.on_models(lambda model: model[2].weight[3, 4].fill_(float("nan")))
    for input, target in data[:2]:
        for side in twins.sides:
            side.optimizer.zero_grad()
            (side.loss(input, target) + side.regularizer(twins.alphas)).backward()
            side.optimizer.step()
    outputs = twins.both(lambda side: side.model(data[0][0]))
    assert all(output.isnan().all() for output in outputs)
    for p, q in zip(*(side.model.parameters() for side in twins.sides), strict=True):
        assert torch.equal(p.isnan(), q.isnan())


def test_a_finalized_copy_is_free_of_it_all(backend):
    """In mid-training, as for an export."""
    twins, data = trained(backend)
    twins.on_models(lambda model: model[2].reset_threshold(0.1))
    dense = dst_kernels.finalize_(copy.deepcopy(twins.ours.model))
    with torch.no_grad():
        assert_close(dense(data[0][0]), twins.ours.model(data[0][0]), "output")
    assert not masked_layers(dense) and not dense._forward_pre_hooks
    go_on(twins, data)
