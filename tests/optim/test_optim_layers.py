"""Layers that are frozen, shared, unused, used twice or called in other ways than all together."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import linear, other_granularities, with_dense_layers
from torch import nn
from twins import Twins, batches, masked_layers

from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "alpha": 0.05}
STEPS = 10
every_network = pytest.mark.parametrize("network", [linear, other_granularities])


def make(model, backend, **options):
    return Twins(model, backend=backend, **{**OPTIONS, **options})


def run(twins, data, steps=STEPS):
    twins.train(data, steps)
    twins.assert_same(data[0][0])


# -- frozen parameters -------------------------------------------------------------------------


def freeze(twins, name, frozen=True, index=1):
    for side in twins.sides:
        getattr(masked_layers(side.model)[index], name).requires_grad_(not frozen)


@every_network
@pytest.mark.parametrize("names", [["weight"], ["threshold"], ["weight", "threshold"]])
def test_frozen_from_the_start(names, network, backend):
    model, shape = network(backend=backend)
    for name in names:
        getattr(masked_layers(model)[1], name).requires_grad_(False)
    twins = make(model, backend)
    run(twins, batches(shape))


@every_network
@pytest.mark.parametrize("names", [["weight"], ["threshold"], ["weight", "threshold"]])
def test_frozen_later_and_thawed(names, network, backend):
    """torch.optim, too, leaves alone what gets no gradient; momentum then waits."""
    model, shape = network(backend=backend)
    twins, data = make(model, backend), batches(shape)
    for frozen in (False, True, False):
        for name in names:
            freeze(twins, name, frozen)
        kept = [getattr(masked_layers(twins.ours.model)[1], n).detach().clone() for n in names]
        run(twins, data, 4)
        now = [getattr(masked_layers(twins.ours.model)[1], n) for n in names]
        assert all(torch.equal(a, b) == frozen for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("left_out", ["weight", "threshold"])
@every_network
def test_parameters_that_nobody_optimizes(network, left_out, backend):
    def groups(model):
        layer = masked_layers(model)[1]
        return [{"params": [p for p in model.parameters() if p is not getattr(layer, left_out)]}]

    model, shape = network(backend=backend)
    twins = make(model, backend, groups=groups)
    kept = getattr(masked_layers(model)[1], left_out).detach().clone()
    run(twins, batches(shape), 5)
    assert torch.equal(kept, getattr(masked_layers(model)[1], left_out))


@every_network
def test_layers_added_in_mid_training(network, backend):
    """Unfreezing: until then such a layer has gradients of its own, and keeps none."""

    def groups(model):
        return [{"params": [p for layer in model[2:] for p in layer.parameters()]}]

    model, shape = network(backend=backend)
    twins, data = make(model, backend, groups=groups), batches(shape)
    assert model[0]._deferral is None
    run(twins, data, 3)
    for side in twins.sides:
        side.optimizer.zero_grad()
        side.model.zero_grad()
        side.optimizer.add_param_group({"params": list(side.model[0].parameters()), "lr": 0.02})
    assert (model[0]._deferral is not None) == (model[0].granularity == "row")
    run(twins, data)


def test_layers_added_between_backward_and_step(backend):
    """What waits in `.grad` of the other layers stays what it is."""

    def groups(model):
        return [{"params": [p for layer in model[2:] for p in layer.parameters()]}]

    model, shape = linear(backend=backend)
    twins, data = make(model, backend, groups=groups), batches(shape)
    twins.backward(*data[0])
    for side in twins.sides:
        side.model[0].zero_grad()
        side.optimizer.add_param_group({"params": list(side.model[0].parameters()), "alpha": None})
    twins.both(lambda side: side.optimizer.step())
    run(twins, data, 3)


# -- layers without a part in it ---------------------------------------------------------------


class Branches(nn.Module):
    """Which of two layers comes last is up to the caller."""

    def __init__(self, backend, **options):
        super().__init__()
        self.first = MaskedLinear(12, 8, backend=backend)
        self.heads = nn.ModuleList(MaskedLinear(8, 4, backend=backend, **options) for _ in "ab")
        self.head = 0

    def forward(self, input):
        return self.heads[self.head](self.first(input).relu())


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_unused_layers(set_to_none, alpha, granularity, backend):
    """Their thresholds follow the regulariser alone; zeros, once there, count as gradients."""
    model = Branches(backend, granularity=granularity).double()
    twins, data = make(model, backend, alpha=alpha), batches((12,))
    for i in range(STEPS):
        for side in twins.sides:
            side.model.head = i // 3 % 2
            side.optimizer.zero_grad(set_to_none)
        twins.backward(*data[i % 4])
        twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


def test_the_guard_looks_at_unused_layers_too(backend):
    """The one difference: layer by layer such a layer waits for a forward that uses it."""
    model = Branches(backend).double()
    twins, data = make(model, backend, alpha=None), batches((12,))
    twins.on_models(lambda model: model.heads[1].reset_threshold(3.0))
    twins.step(*data[0])
    ours, theirs = (side.model.heads[1].threshold for side in twins.sides)
    assert not ours.any() and bool((theirs == 3.0).all())
    for side in twins.sides:
        side.model.head = 1
    twins.step(*data[1])
    twins.assert_same(data[0][0])


def test_layers_outside_of_the_models_forward(backend):
    """A part that is called by itself: its layers mask their own weights."""
    model, shape = linear(backend=backend)
    twins, data = make(model, backend), batches(shape)
    for i in range(STEPS):
        for side in twins.sides:
            side.optimizer.zero_grad()
            output = data[i % 4][0]
            for part in (side.model[:2], side.model[2:]) if i % 2 else side.model:
                output = part(output)
            loss = nn.functional.cross_entropy(output, data[i % 4][1])
            (loss + side.regularizer(twins.alphas)).backward()
            side.optimizer.step()
    twins.assert_same(data[0][0])


class Renormalized(MaskedLinear):
    """Bounds its rows before every product, as some networks for short signals do."""

    assigns = False

    def forward(self, input):
        bounded = torch.renorm(self.weight.data, 2, 0, 0.5)
        if self.assigns:
            self.weight.data = bounded
        else:
            with torch.no_grad():
                self.weight.copy_(bounded)
        return super().forward(input)


@pytest.mark.parametrize("assigns", [False, True])
def test_layers_that_write_their_weight_in_forward(assigns, backend):
    """After the hook on the model has packed it."""
    layer = Renormalized(12, 10, backend=backend)
    layer.assigns = assigns
    model = nn.Sequential(layer, nn.ReLU(), MaskedLinear(10, 4, backend=backend)).double()
    run(make(model, backend), batches((12,)))


# -- models without anything to defer ----------------------------------------------------------


def test_a_model_without_masked_layers_is_refused():
    for params in (None, [nn.Parameter(torch.ones(2))]):
        with pytest.raises(ValueError, match=r"no masked layers: convert it with .*sparsify_"):
            DSTSGD(nn.Linear(2, 2), params)


def test_a_model_in_which_nothing_can_be_deferred(backend):
    """A plain optimizer then; with alpha for thresholds, wherever they stand."""
    layer = MaskedLinear(12, 4, granularity="layer", backend=backend)
    twins = make(layer.double(), backend)
    assert layer._deferral is None
    run(twins, batches((12,)))


def test_parameters_from_elsewhere(backend):
    """Of the loss, say: any optimizer takes them."""
    model, shape = with_dense_layers(backend=backend)
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    twin = copy.deepcopy(model)
    other = nn.Parameter(scale.detach().clone())
    ours = DSTSGD(model, [*model.parameters(), scale], lr=0.1, backend=backend)
    theirs = torch.optim.SGD([*twin.parameters(), other], lr=0.1)
    for input, target in batches(shape):
        for each, factor, optimizer in ((model, scale, ours), (twin, other, theirs)):
            nn.functional.cross_entropy(each(input) * factor, target).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(scale, other, rtol=1e-12, atol=0)
    assert scale != 1
