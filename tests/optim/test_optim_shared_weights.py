"""Layers used twice, and weights and thresholds that several layers share."""

from __future__ import annotations

import pytest
import torch
from networks import linear
from torch import nn
from twins import Twins, batches

import dst_kernels
from dst_kernels.nn import MaskedLinear

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "alpha": 0.05}


@pytest.fixture
def backend(best_backend):
    return best_backend


def make(model, backend):
    return Twins(model, backend=backend, **OPTIONS)


def run(twins, data):
    twins.train(data, 10)
    twins.assert_same(data[0][0])


class Twice(nn.Module):
    """One layer in two places, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight = self.one.weight
        self.last = nn.Linear(12, 4)

    def forward(self, input):
        twice = self.layer(self.layer(input).relu()).relu()
        return self.last(self.other(self.one(twice).relu()).relu())


def test_tied_weights_and_layers_used_twice(backend):
    config = dst_kernels.SparsifyConfig(backend=backend)
    model = dst_kernels.sparsify_(Twice(), config).double()
    assert model.one.threshold is model.other.threshold
    twins, data = make(model, backend), batches((12,))
    run(twins, data)
    twins.on_models(lambda model: model.other.reset_threshold(3.0))
    run(twins, data)
    assert model.one._deferral is not None and model.other._deferral is not None


@pytest.mark.parametrize("option", ["threshold", "surrogate"])
def test_tied_weights_that_are_masked_in_two_ways(option, backend):
    """There is no one G for both, so each makes gradients of its own."""
    config = dst_kernels.SparsifyConfig(backend=backend)
    model = dst_kernels.sparsify_(Twice(), config).double()
    if option == "threshold":
        model.other.threshold = nn.Parameter(torch.full_like(model.one.threshold, 0.1))
    else:
        model.other.surrogate = "triangular"
    twins = make(model, backend)
    assert model.one._deferral is None and model.layer._deferral is not None
    run(twins, batches((12,)))


def test_a_threshold_of_two_weights(backend):
    """It gets the gradients of both."""
    model, shape = linear(backend=backend)
    other = MaskedLinear(16, 16, backend=backend).double()
    other.threshold = model[2].threshold
    model = nn.Sequential(*model[:4], other, nn.ReLU(), model[4])
    twins = make(model, backend)
    assert model[2]._deferral is other._deferral is None is not model[0]._deferral
    run(twins, batches(shape))


def test_a_weight_that_a_dense_layer_uses_too(backend):
    model, shape = linear(backend=backend)
    head = nn.Linear(16, 4).double()
    head.weight = model[-1].weight
    model = nn.Sequential(model[:-1], nn.ModuleList([model[-1], head]))
    model.forward = None  # never called as it is

    class Both(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.body, self.heads = model

        def forward(self, input):
            hidden = self.body(input)
            return self.heads[0](hidden) + self.heads[1](hidden)

    twins = make(Both(model), backend)
    assert twins.ours.model.heads[0]._deferral is None
    run(twins, batches(shape))


def test_tied_layers_whose_options_part_later(backend):
    """Have gradients of their own from then on, in both trainings alike."""
    model = nn.Sequential(MaskedLinear(6, 6), nn.Tanh(), MaskedLinear(6, 6), nn.Tanh())
    model.append(nn.Linear(6, 4))
    model[2].weight, model[2].threshold = model[0].weight, model[0].threshold
    twins = Twins(model.double(), backend=backend, **OPTIONS)
    twins.train(batches((6,)), 2)
    assert model[0]._deferral is not None
    for side in twins.sides:
        side.model[2].surrogate = "straight_through"
    twins.train(batches((6,)), 3)
    assert model[0]._deferral is None
    twins.assert_same(batches((6,))[0][0])
