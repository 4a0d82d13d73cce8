"""Deferred steps side by side with layer-by-layer gradients and torch's optimizers, in float64."""

from __future__ import annotations

import pytest
from networks import NETWORKS, conv2d, linear, other_granularities
from twins import Twins, batches, masked_layers

from dst_kernels.reference.surrogate import SURROGATES

STEPS = 80
RAISED = {20: 0, 35: 1, 50: -1}  # at which step the thresholds of which layer go up
OPTIONS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "alpha": 1e-2},
    "adamw": {"lr": 0.01, "alpha": 1e-2},
}

# Of the others each takes seconds on the reference.
FAST = (linear, conv2d, other_granularities)
EACH_NETWORK = pytest.mark.parametrize(
    "network",
    [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in NETWORKS],
    ids=lambda network: network.__name__,
)


def train_and_compare(network, backend, rule, steps=STEPS, reset_ratio=0.01, **options):
    """Resets by the guard come on the way."""
    model, shape = network(backend=backend, reset_ratio=reset_ratio)
    twins = Twins(model, rule, backend=backend, **options)
    data = batches(shape)

    def raise_thresholds(step):
        if step in RAISED and reset_ratio is not None:
            twins.on_models(lambda model: masked_layers(model)[RAISED[step]].reset_threshold(3.0))

    twins.train(data, steps, raise_thresholds)
    twins.assert_same(data[0][0])
    return twins


@pytest.mark.parametrize("rule", OPTIONS)
@EACH_NETWORK
def test_every_network(network, rule, backend):
    twins = train_and_compare(network, backend, rule, **OPTIONS[rule])
    assert twins.resets >= len(RAISED)


@EACH_NETWORK
def test_natural_collapse(network, backend):
    """A strong regulariser empties layers, whose thresholds then start over."""
    options = {"lr": 0.1, "momentum": 0.5, "alpha": 0.3}
    model, shape = network(backend=backend)
    twins = Twins(model, "sgd", backend=backend, **options)
    data = batches(shape)
    twins.train(data, 40)
    twins.assert_same(data[0][0])
    assert twins.resets >= 2


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("structure_gradient", [True, False])
def test_every_gradient_of_the_mask(surrogate, structure_gradient, backend):
    model, shape = linear(
        backend=backend, surrogate=surrogate, structure_gradient=structure_gradient
    )
    twins = Twins(model, "sgd", backend=backend, **OPTIONS["sgd"])
    data = batches(shape)
    twins.train(data, 40)
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("rule", OPTIONS)
def test_without_guard(rule, backend):
    twins = train_and_compare(linear, backend, rule, reset_ratio=None, **OPTIONS[rule])
    assert twins.resets == 0
    assert any(
        (t > 0).any() for t in (layer.threshold for layer in masked_layers(twins.ours.model))
    )


def test_small_buckets(backend):
    model, shape = linear(backend=backend)
    twins = Twins(model, "sgd", backend=backend, bucket_mb=1e-3, **OPTIONS["sgd"])
    twins.train(batches(shape), 20)
    twins.assert_same(batches(shape)[0][0])
