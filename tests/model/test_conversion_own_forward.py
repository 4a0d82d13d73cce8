"""Users' layers that are called, copied and written to in unusual ways: masked or left dense."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from users_layers import LAYERS, Direct, Plain, Twice, build, input_of, output_of
from users_layers import prune as raise_thresholds

import dst_kernels
from dst_kernels import finalize_, plan_sparsify, sparsify_
from dst_kernels.nn import MaskedModule
from dst_kernels.optim import DSTSGD

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def converted(kind):
    return raise_thresholds(sparsify_(build(kind)))


def baked(layer):
    """Return the dense layer of the user's with W * M as its weight."""
    return finalize_(copy.deepcopy(layer))


# -- other ways to call ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_called_by_its_name(kind):
    layer, x = converted(kind), input_of(kind)
    outputs = layer.forward(x), baked(layer).forward(x)
    outputs = (each if isinstance(each, torch.Tensor) else each[0] for each in outputs)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)


class Called(nn.Linear):
    """Computes in `__call__`, and has no forward of its own."""

    def __call__(self, input):
        return F.linear(input, self.weight, self.bias) * 2


class CallsForward(nn.Linear):
    def __call__(self, input):
        return self.forward(input) * 2


@pytest.mark.parametrize("kind", [Called, CallsForward])
def test_a_call_that_does_without_that_of_torch(kind):
    layer = build(kind)
    expected = layer(X)
    sparsify_(layer)
    assert torch.equal(layer(X), expected)
    if isinstance(layer, MaskedModule):
        raise_thresholds(layer)
        torch.testing.assert_close(layer(X), baked(layer)(X))
        layer(X).square().sum().backward()
        assert layer.threshold.grad.any()
    else:
        assert "__call__" in plan_sparsify(layer).layers[0].reason


# -- writes ------------------------------------------------------------------------------------


class MaxNorm(nn.Linear):
    """Limits its weight's norm before each use, as networks for brain signals do."""

    def forward(self, input):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(input)


class Clamped(nn.Linear):
    def forward(self, input):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(input)


@pytest.mark.parametrize("kind", [MaxNorm, Clamped])
def test_a_forward_that_writes_to_its_weight(kind):
    """Writes to the Parameter, or the layer is left dense with the reason."""
    layer, before = build(kind), build(kind)
    sparsify_(layer)
    if not isinstance(layer, MaskedModule):
        assert "weight" in plan_sparsify(layer).layers[0].reason
    for _ in range(2):
        torch.testing.assert_close(layer(X), before(X))
    torch.testing.assert_close(layer.weight, before.weight)


@pytest.mark.parametrize("kind", [nn.Linear, Plain, Direct])
def test_a_hook_that_writes_to_the_weight(kind):
    layer = sparsify_(build(kind))
    layer.register_forward_pre_hook(lambda module, _: module.weight.data.clamp_(-0.1, 0.1))
    layer(X)
    assert layer.weight.abs().max() <= 0.1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", [nn.Linear, Plain, Direct, Twice])
@pytest.mark.parametrize("way", ["parametrized", "pruned"])
def test_what_computes_the_weight_after_the_conversion(kind, way):
    """Comes before the mask, or is refused: torch's property would hide ours."""
    layer, dense = converted(kind), build(kind)
    if way == "parametrized":
        parametrize.register_parametrization(layer, "weight", Doubled())
    else:
        prune.l1_unstructured(layer, "weight", 0.3)
    if way == "parametrized" and kind is not nn.Linear:
        with pytest.raises(RuntimeError, match="a forward of its own and a parametrized weight"):
            layer(X)
        return
    with torch.no_grad():
        masked = layer.weight * (layer.weight.abs() > layer.threshold[:, None])
        dense.weight.copy_(masked)
    torch.testing.assert_close(layer(X), dense(X))


# -- copies and classes ------------------------------------------------------------------------


class OwnState(nn.Linear):
    """Leaves something out of its pickles, and makes it anew."""

    def __init__(self, *args):
        super().__init__(*args)
        self.cache = lambda: "old"

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cache = len


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo):
        new = type(self)(self.in_features, self.out_features).to(self.weight.dtype)
        new.load_state_dict(self.state_dict())
        return new


class OwnReduce(nn.Linear):
    def __reduce__(self):
        return OwnReduce, (6, 5), self.__dict__


@pytest.mark.parametrize("kind", [OwnState, OwnCopy, OwnReduce])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layers_with_copies_of_their_own(kind, copied):
    layer = converted(kind)
    twin = copied(layer)
    assert type(twin) is type(layer) and torch.equal(twin(X), layer(X))
    assert twin.threshold is not layer.threshold
    assert getattr(twin, "cache", len) is len


class Registered(nn.Linear):
    """Wants to know the tag of each subclass."""

    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)


def test_a_class_that_cannot_be_derived_from():
    """Is left dense or converted, as the plan says, and the model is never half converted."""
    model = nn.Sequential(build(nn.Linear), Registered(5, 6).double(), build(nn.Linear))
    expected = model(X)
    planned = plan_sparsify(model).named("convert")
    sparsify_(model)
    assert planned == [
        name for name, layer in model.named_children() if isinstance(layer, MaskedModule)
    ]
    assert isinstance(model[2], MaskedModule)
    assert torch.equal(model(X), expected)


# -- beside training ---------------------------------------------------------------------------


class Watched(nn.Linear):
    """Lets another thread call the model in the midst of its forward."""

    def __init__(self, *args):
        super().__init__(*args)
        self.meanwhile = {}

    def forward(self, input):
        half = F.linear(input, self.weight)
        self.meanwhile.get(threading.get_ident(), lambda: None)()
        return half + self.weight.sum() + self.bias


def users_network():
    torch.manual_seed(0)
    layers = Direct(6, 5), nn.Tanh(), Watched(5, 5), nn.Tanh(), Twice(5, 4)
    return raise_thresholds(sparsify_(nn.Sequential(*layers).double()))


def train(model, optimizer):
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def optimizer_of(model, deferred):
    if deferred:
        return DSTSGD(model, lr=0.1)
    return torch.optim.SGD(dst_kernels.group_(model).parameters(), lr=0.1)


def expected_state():
    model = users_network()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("deferred", [False, True], ids=["grouped", "deferred"])
@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode])
def test_another_thread_in_the_midst_of_a_users_forward(deferred, scope):
    model = users_network()
    optimizer = optimizer_of(model, deferred)

    def look():
        with scope():
            assert model(X).isfinite().all()
        assert model[2].weight is model[2]._parameters["weight"], "outside of a call: the Parameter"

    def meanwhile():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(look).result(60)

    model[2].meanwhile[threading.get_ident()] = meanwhile
    state = train(model, optimizer)
    for name, value in expected_state().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("deferred", [False, True], ids=["grouped", "deferred"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_users_forwards(deferred, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = users_network()

        def forward(self, x):
            return checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=reentrant)

    model = Checkpointed()
    state = train(model, optimizer_of(model, deferred))
    for name, value in expected_state().items():
        torch.testing.assert_close(state[f"inner.{name}"], value, rtol=1e-12, atol=1e-13)


def test_a_users_forward_that_fails_leaves_the_parameter():
    layer = converted(Direct)
    with pytest.raises(RuntimeError):
        layer(X[:, :3])
    assert layer.weight is layer._parameters["weight"]
    torch.testing.assert_close(output_of(layer, X), baked(layer)(X))
