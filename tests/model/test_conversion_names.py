"""Attributes of the user's with names that masked layers have, too: both go on."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels import SparsifyConfig, densify_, finalize_, plan_sparsify, sparsify_
from dst_kernels.nn import MaskedLinear, MaskedModule
from dst_kernels.optim import DSTSGD

NAMES = (
    "granularity", "reset_ratio", "surrogate", "structure_gradient", "backend", "path", "mask",
    "remaining_ratio", "reset_threshold", "gathered", "from_dense", "to_dense",
)  # fmt: skip


class Users(nn.Linear):
    """Computes with something of the user's that is called as the tests say."""

    name = ""

    def forward(self, input):
        value = getattr(self, self.name)
        return F.linear(input, self.weight, self.bias) * (value() if callable(value) else value)


class Inherits(nn.Linear):
    """Has torch's own forward, and something of the user's beside it."""

    name = ""


def instance_attribute(layer, name):
    setattr(layer, name, 2.0)


def class_attribute(layer, name):
    setattr(type(layer), name, 2.0)


def a_property(layer, name):
    setattr(type(layer), name, property(lambda self: 2.0))


def a_method(layer, name):
    setattr(type(layer), name, lambda self: 2.0)


def a_buffer(layer, name):
    layer.register_buffer(name, torch.tensor(2.0))


def a_parameter(layer, name):
    layer.register_parameter(name, nn.Parameter(torch.tensor(2.0)))


def a_submodule(layer, name):
    layer.add_module(name, Two())


class Two(nn.Module):
    def forward(self):
        return 2.0


KINDS = (
    instance_attribute, class_attribute, a_property, a_method, a_buffer, a_parameter, a_submodule,
)  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
every_name = pytest.mark.parametrize("name", NAMES)


def layer_with(name, kind, base=Users):
    """Return a layer of a new class of the user's."""
    torch.manual_seed(0)
    cls = types.new_class("TheUsers", (base,), exec_body=lambda ns: ns.update(name=name))
    layer = cls(6, 5).double()
    kind(layer, name)
    return layer


def value_of(layer, name):
    value = getattr(layer, name)
    value = value() if callable(value) else value
    return value.item() if isinstance(value, torch.Tensor) else value


def threshold_in_the_middle(layer):
    with torch.no_grad():
        layer.threshold.copy_(layer.weight.detach().abs().median(1).values)


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


@every_name
@every_kind
@pytest.mark.parametrize("base", [Users, Inherits])
def test_names_of_the_users_beside_ours(name, kind, base):
    """Keep the value, and break neither output, nor report, regulariser, optimizer, nor the end."""
    factor = 2 if base is Users else 1
    layer, before = layer_with(name, kind, base), layer_with(name, kind, base)
    cls, model = type(layer), nn.Sequential(layer)
    expected = layer(X)
    config = SparsifyConfig(surrogate="triangular", reset_ratio=0.02)
    sparsify_(model, config)
    assert model[0] is layer and isinstance(layer, MaskedLinear) and isinstance(layer, cls)
    assert value_of(layer, name) == 2
    assert torch.equal(layer(X), expected)
    assert layer.masking.surrogate == "triangular" and layer.masking.reset_ratio == 0.02
    assert layer.masking.granularity == "row" and layer.masking.backend == "auto"

    threshold_in_the_middle(layer)
    kept = layer.weight.detach().abs() > layer.threshold.detach()[:, None]
    pruned = factor * F.linear(X, layer.weight * kept, layer.bias)
    torch.testing.assert_close(layer(X), pruned)
    assert dst_kernels.remaining_ratio(model) == kept.double().mean()
    assert f"{kept.double().mean():.2%}" in str(dst_kernels.sparsity_report(model))
    penalty = dst_kernels.sparse_regularization(model)
    torch.testing.assert_close(penalty, torch.exp(-layer.threshold.detach()).sum())

    twin = copy.deepcopy(model)
    assert value_of(twin[0], name) == 2
    for each, optimizer in (
        (model, torch.optim.SGD(model.parameters(), lr=0.1)),
        (twin, DSTSGD(twin, list(twin.parameters()), lr=0.1)),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            each(X).square().mean().backward()
            optimizer.step()
    for key, trained in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], trained, rtol=1e-12, atol=1e-13)

    expected = twin.eval()(X)
    finalize_(twin)
    torch.testing.assert_close(twin(X), expected, rtol=1e-12, atol=1e-13)
    densify_(model)
    for dense in (twin[0], model[0]):
        assert type(dense) is cls and dense.state_dict().keys() == before.state_dict().keys()
        assert vars(dense).keys() == vars(before).keys()
        assert kind is a_parameter or value_of(dense, name) == 2  # a parameter was trained


@every_name
def test_an_attribute_of_one_plain_layer(name):
    """Set on an instance of torch's own class, before the conversion, stays the user's."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    expected, note = model(X), object()
    setattr(model[0], name, note)
    sparsify_(model)
    assert getattr(model[0], name) is note
    assert all(isinstance(layer, MaskedLinear) for layer in model)
    assert torch.equal(model(X), expected)
    assert 0 < dst_kernels.remaining_ratio(model) <= 1
    dst_kernels.sparsity_report(model)
    finalize_(model)
    assert getattr(model[0], name) is note and not hasattr(model[1], name)


class Autoregressive(nn.Linear):
    """Multiplies its weight with a fixed mask, a buffer of that name."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs).tril())

    def forward(self, input):
        return F.linear(input, self.mask * self.weight, self.bias)


def test_a_fixed_mask_of_the_users():
    torch.manual_seed(0)
    model = nn.Sequential(Autoregressive(6, 5)).double()
    expected = model(X)
    sparsify_(model)
    layer = model[0]
    assert torch.equal(model(X), expected)
    assert torch.equal(layer.mask, torch.ones(5, 6).tril().double())
    threshold_in_the_middle(layer)
    kept = layer.weight.detach().abs() > layer.threshold.detach()[:, None]
    expected = F.linear(X, layer.weight * kept * layer.mask, layer.bias)
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(finalize_(copy.deepcopy(model))(X), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), expected)


# -- names that masked layers need -------------------------------------------------------------


@pytest.mark.parametrize("name", ["threshold", "masking"])
@every_kind
@pytest.mark.parametrize("base", [Users, Inherits])
def test_names_that_leave_a_layer_dense(name, kind, base):
    """Say so in the plan, and leave everything as it is."""
    layer = layer_with(name, kind, base)
    model, cls, attributes = (
        nn.Sequential(layer, nn.Linear(5, 4).double()),
        type(layer),
        vars(layer),
    )
    expected, before = model(X), dict(attributes)
    planned = {each.name: each for each in plan_sparsify(model).layers}
    assert planned["0"].action == "skip" and name in planned["0"].reason
    assert planned["1"].action == "convert"
    sparsify_(model)
    assert type(layer) is cls and vars(layer) == before
    assert value_of(layer, name) == 2
    assert isinstance(model[1], MaskedLinear) and not isinstance(layer, MaskedModule)
    assert torch.equal(model(X), expected)


def test_a_recurrent_module_with_a_name_that_is_needed():
    module = nn.LSTM(4, 5)
    module.threshold_ih_l0 = "the user's"
    (planned,) = plan_sparsify(module).layers
    assert planned.action == "skip" and "threshold_ih_l0" in planned.reason
    assert type(sparsify_(module)) is nn.LSTM and module.threshold_ih_l0 == "the user's"


# -- options -----------------------------------------------------------------------------------

OTHERS = {
    "reset_ratio": None,
    "surrogate": "triangular",
    "structure_gradient": False,
    "backend": "reference",
    "path": "packed",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("converted", [False, True])
def test_options_of_our_own_layers_by_their_names(name, converted):
    layer = sparsify_(nn.Linear(4, 3)) if converted else MaskedLinear(4, 3)
    masking = layer.masking
    setattr(layer, name, OTHERS[name])
    assert getattr(layer, name) == getattr(layer.masking, name) == OTHERS[name]
    assert getattr(masking, name) != OTHERS[name], "options are immutable"
    with pytest.raises(AttributeError):
        setattr(masking, name, OTHERS[name])
    assert name not in vars(layer)
    assert getattr(copy.deepcopy(layer), name) == OTHERS[name]
    assert "masking" not in vars(densify_(layer))
