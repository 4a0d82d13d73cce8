"""Forwards with parts in another gradient mode, and forwards that are broken off."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from threads import (
    assert_same_gradients,
    assert_same_state,
    batch,
    every_scope,
    every_way,
    network,
    prepared,
    training_step,
)
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.nn import MaskedLinear

# -- other gradient modes within a forward -----------------------------------------------------


class Modes(nn.Module):
    """Runs its three layers in gradient modes of their own."""

    def __init__(self, scopes):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MaskedLinear(6, 6) for _ in range(3)).double()
        for layer in self.layers:
            nn.init.uniform_(layer.threshold, 0, 0.1)
        self.scopes = scopes

    def forward(self, x):
        for scope, layer in zip(self.scopes, self.layers, strict=True):
            with scope():
                x = layer(x).tanh()
        return x


no, yes, unset = torch.no_grad, torch.enable_grad, contextlib.nullcontext


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("scopes", [(unset, yes, yes), (no, unset, yes), (no, no, yes)])
@every_way
def test_parts_with_a_gradient_mode_of_their_own(way, scopes, outer):
    """Have gradients where they are enabled, whatever the model was called with."""
    plain, model = Modes(scopes), Modes(scopes)
    optimizer = prepared(way, model)
    twin = torch.optim.AdamW if way == "DSTAdamW" else torch.optim.SGD
    twin = twin(dst_kernels.parameter_groups(plain), **{
        key: optimizer.defaults[key] for key in ("lr", "momentum") if key in optimizer.defaults
    })  # fmt: skip
    for step in range(4):
        for each, its_optimizer in ((plain, twin), (model, optimizer)):
            its_optimizer.zero_grad()
            with outer():
                output = each(batch(step))
            output.square().mean().backward()
            its_optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda inner: inner], ids=["within", "the same"])
@every_scope
def test_groups_within_groups_of_another_mode(wrap, scope):
    """Leave a forward of the outer group its gradients, also when called in its midst."""
    inner, plain = network(), network()
    outer = dst_kernels.group_(wrap(dst_kernels.group_(inner)))

    def look():
        with scope():
            inner(batch(5))

    for step in range(3):
        inner[3].actions[threading.get_ident()] = lambda: inner[3].actions.clear() or look()
        loss = outer(batch(step)).square().mean()
        look()
        loss.backward()
        plain(batch(step)).square().mean().backward()
    assert_same_gradients(inner, plain)


@pytest.mark.parametrize("paths", [("auto", "fused"), ("fused", "auto"), ("auto", "auto")])
@every_way
def test_tied_layers_and_a_forward_without_gradients_before_backward(way, paths):
    """Change nothing that the backward needs, also where one layer masks by itself."""

    def tied():
        torch.manual_seed(0)
        first, second = (MaskedLinear(6, 6, path=path) for path in paths)
        second.weight, second.threshold = first.weight, first.threshold
        nn.init.uniform_(first.threshold, 0, 0.1)
        return nn.Sequential(first, nn.Tanh(), second).double()

    model, alone = tied(), tied()
    optimizer, solo = prepared(way, model), prepared(way, alone)

    def look():
        with torch.no_grad():
            model(batch(7))

    for step in range(3):
        training_step(model, optimizer, step, look)
        training_step(alone, solo, step)
    assert_same_state(model, alone)


# -- forwards that are broken off --------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])
@every_way
def test_a_forward_that_was_broken_off(way, first, error):
    """Leaves nothing that the next forward, of the model or of a layer, might use."""
    model, alone = network(), network()
    optimizer, solo = prepared(way, model), prepared(way, alone)

    def fail():
        model[3].actions.clear()
        raise error

    for step in range(3):
        training_step(model, optimizer, step)
        training_step(alone, solo, step)
        model[3].actions[threading.get_ident()] = fail
        with pytest.raises(error), first():
            model(batch(step))
    model.zero_grad()
    layer, x = model[5], torch.ones(2, 7, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    if error is ValueError:  # what torch tells no hook of ends with the model's next forward
        with torch.no_grad():
            layer.weight.data.neg_()
            expected = F.linear(x, layer.weight * layer.mask(), layer.bias)
            torch.testing.assert_close(layer(x), expected)
            layer.weight.data.neg_()
    training_step(model, optimizer, 3)
    training_step(alone, solo, 3)
    assert_same_state(model, alone)
