"""Forwards beside the one that a deferred step belongs to, and forwards that go wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import channels_last, conv2d, linear
from ops.authors import AuthorsLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import Twins, assert_close, batches

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.nn.sources import deferred, grouped
from dst_kernels.optim import DSTSGD

OPTIONS = {"lr": 0.1, "momentum": 0.9, "alpha": 0.05}


@pytest.fixture
def backend(best_backend):
    return best_backend


def trained(backend, network=linear, steps=3, **options):
    model, shape = network(backend=backend)
    twins = Twins(model, backend=backend, **{**OPTIONS, **options})
    data = batches(shape)
    twins.train(data, steps)
    return twins, data


@pytest.fixture
def packed(monkeypatch):
    """How many weights have been packed outside of steps."""
    counts = []
    pack = deferred.pack_weights

    def counting(weights, *args):
        counts.append(len(weights))
        return pack(weights, *args)

    for module in (deferred, grouped):
        monkeypatch.setattr(module, "pack_weights", counting)
    return counts


def packs(optimizer):
    return {key: made.weight.tensor for key, made in optimizer._deferral._made.items()}


# -- evaluation --------------------------------------------------------------------------------

SCOPES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("network", [linear, channels_last])
def test_evaluation_between_steps(network, scope, backend, packed):
    """It changes nothing, and masks anew: weights may have been written in ways nobody sees."""
    twins, data = trained(backend, network)
    model, optimizer = twins.ours.model, twins.ours.optimizer
    before, kept = copy.deepcopy(model.state_dict()), packs(optimizer)
    packed.clear()
    twins.both(lambda side: side.model.eval())
    with scope():
        outputs = twins.both(lambda side: side.model(data[0][0]).clone())
    assert_close(*outputs, "output")
    twins.both(lambda side: side.model.train())
    assert packed == [3]
    assert all(packs(optimizer)[key] is tensor for key, tensor in kept.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    packed.clear()
    twins.train(data, 3)
    assert not packed
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_evaluation_before_the_first_step(scope, backend):
    """What inference mode makes cannot be kept for training."""
    twins, data = trained(backend, steps=0)
    twins.both(lambda side: side.model.eval())
    with scope():
        outputs = twins.both(lambda side: side.model(data[0][0]).clone())
    assert_close(*outputs, "output")
    twins.both(lambda side: side.model.train())
    twins.train(data, 3)
    twins.assert_same(data[0][0])


def test_evaluation_in_another_dtype(backend):
    """The pack of one is not that of the other."""
    model, shape = linear(backend=backend)
    model.float()
    optimizer = DSTSGD(model, lr=0.1, backend=backend)
    input = batches(shape, dtype=torch.float32)[0][0]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            training = model(input)
        with torch.no_grad():
            single = model(input)
        assert training.dtype == torch.bfloat16 and single.dtype == torch.float32
        expected = copy.deepcopy(model)(input)
        assert torch.equal(single, expected)
        training.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_evaluation_between_forward_and_backward(backend):
    twins, data = trained(backend)
    for input, target in data:
        twins.both(lambda side: side.optimizer.zero_grad())
        for side in twins.sides:
            loss = side.loss(input, target) + side.regularizer(twins.alphas)
            with torch.no_grad():
                side.model.eval()(data[0][0])
            side.model.train()
            loss.backward()
            side.optimizer.step()
    twins.assert_same(data[0][0])


def test_training_in_evaluation_mode(backend, packed):
    """For frozen batch statistics, say. Every forward masks anew."""
    twins, data = trained(backend, steps=0)
    twins.both(lambda side: side.model.eval())
    twins.train(data, 5)
    twins.assert_same()
    assert packed == [3] * 5, "once for all three layers"


@pytest.mark.parametrize("mode_of_step", ["train", "eval"])
def test_collapsed_layers_in_evaluation_mode(mode_of_step, backend, packed):
    """Their step starts from the effective thresholds, which it writes, and goes on from there."""
    twins, data = trained(backend)
    twins.ours.model[2].reset_threshold(3.0)
    twins.theirs.model[2].reset_threshold(0.0)  # as after a reset
    for layer in (side.model[2] for side in twins.sides):
        layer.eval()
    twins.both(lambda side: side.optimizer.zero_grad())
    packed.clear()
    twins.backward(*data[0])
    assert bool((twins.ours.model[2].threshold == 3.0).all()), "an evaluation wrote"
    twins.ours.model[2].train(mode_of_step == "train")
    twins.both(lambda side: side.optimizer.step())
    twins.ours.model[2].eval()
    twins.train(data, 3)
    twins.assert_same(data[0][0])


def test_a_training_forward_commits_what_an_evaluation_did_not(backend):
    """Though both compute with the same masked weights."""
    twins, data = trained(backend)
    layer = twins.ours.model[2]
    layer.reset_threshold(3.0)
    twins.ours.model.eval()(data[0][0])
    assert bool((layer.threshold == 3.0).all())
    twins.ours.model.train()(data[0][0])
    assert not layer.threshold.any()


@pytest.mark.parametrize("network", [linear, conv2d])
def test_weights_unchanged(network, backend):
    """Evaluations reuse packs of their own; a step inside of the scope is noticed, too."""
    twins, data = trained(backend, network)
    with dst_kernels.weights_unchanged(twins.ours.model):
        for _ in range(2):
            with torch.no_grad():
                assert_close(*twins.both(lambda side: side.model(data[0][0])), "output")
        twins.train(data, 3)
        with torch.no_grad():
            assert_close(*twins.both(lambda side: side.model(data[0][0])), "output")
    twins.train(data, 3)
    twins.assert_same(data[0][0])


# -- more than one forward ---------------------------------------------------------------------


def test_forwards_in_any_order(backend):
    """Of three forwards the second is thrown away, the others go backward in turn."""
    twins, data = trained(backend)
    for _ in range(3):
        twins.both(lambda side: side.optimizer.zero_grad())
        for side in twins.sides:
            losses = [side.loss(*batch) for batch in data[:3]]
            losses[2].backward()
            (losses[0] + side.regularizer(twins.alphas)).backward()
            side.optimizer.step()
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("network", [linear, conv2d])
def test_backward_after_a_step_is_an_error(network, backend):
    """The masked weights are others then. Not for the last layer: nothing goes through it."""
    twins, data = trained(backend, network)
    side = twins.ours
    late = side.loss(*data[0])
    side.loss(*data[1]).backward()
    side.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_second_backward_is_an_error(backend):
    twins, data = trained(backend)
    loss = twins.ours.loss(*data[0])
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, backend):
    """Recomputed in backward with the same masked weights."""

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input):
            first, rest = self.model[:2], self.model[2:]
            input = input.requires_grad_(reentrant)
            return rest(checkpoint(first, input, use_reentrant=reentrant))

    model, shape = linear(backend=backend)
    twins = Twins(Checkpointed(model), backend=backend, **OPTIONS)
    twins.train(batches(shape), 6)
    twins.assert_same(batches(shape)[0][0])


# -- forwards that go wrong --------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.first = MaskedLinear(12, 8, backend=backend)
        self.last = MaskedLinear(8, 4, backend=backend)
        self.fails = False

    def forward(self, input):
        hidden = self.first(input).relu()
        if self.fails:
            raise FloatingPointError("on purpose")
        return self.last(hidden)


def test_exceptions_inside_forward(backend):
    model = Failing(backend).double()
    twins, data = Twins(model, backend=backend, **OPTIONS), batches((12,))
    for _ in range(3):
        model.fails = True
        with pytest.raises(FloatingPointError):
            model(data[0][0])
        model.fails = False
        twins.step(*data[1])
        twins.on_models(lambda model: model.last.reset_threshold(3.0))
        twins.step(*data[2])
    twins.assert_same(data[0][0])


def test_a_batch_of_the_wrong_width(backend):
    twins, data = trained(backend)
    with pytest.raises(RuntimeError):
        twins.ours.model(torch.ones(2, 5, dtype=torch.float64))
    twins.train(data, 3)
    twins.assert_same(data[0][0])


def test_gradient_penalties(backend):
    """G may come from a second backward: the rule knows it only as dL/d(W * M)."""
    ours = MaskedLinear(6, 4, backend=backend).double()
    theirs = AuthorsLinear(ours)
    optimizers = (
        DSTSGD(ours, lr=0.002, backend=backend),
        torch.optim.SGD(theirs.parameters(), lr=0.002),
    )
    for step in range(6):
        data = torch.randn(3, 6, dtype=torch.float64)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            if step == 2:
                layer.threshold.data = torch.full_like(layer.threshold, 0.2)
            input = data.clone().requires_grad_()
            output = layer(input).square().sum()
            (grad,) = torch.autograd.grad(output, input, create_graph=True)
            optimizer.zero_grad()
            (output + grad.square().sum()).backward()
            optimizer.step()
    assert ours.threshold.any()
    for name in ("weight", "threshold", "bias"):
        assert_close(getattr(ours, name), getattr(theirs, name), name)
