"""What a parent reads of its layers is masked while its forward runs."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import prune_half

import dst_kernels
from dst_kernels.nn import MaskedLinear


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)


class Functional(Parent):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class Variable(Parent):
    def forward(self, x):
        weight = self.a.weight
        return self.b(x @ weight.t())


class Transposed(Parent):
    def forward(self, x):
        return self.b(x @ self.a.weight.T)


class Helper(Parent):
    def forward(self, x):
        return self.b(self._first(x))

    def _first(self, x):
        return F.linear(x, self.a.weight)


class Nested(Parent):
    def forward(self, x):
        def inner():
            return F.linear(x, self.a.weight)

        return self.b(inner())


class Comprehension(Parent):
    def forward(self, x):
        return self.b(sum([F.linear(x, self.a.weight) for _ in range(2)]))


class Inherited(Functional):
    pass


class CallsSuper(Functional):
    def forward(self, x):
        return super().forward(x) + 1


class HelperCallsSuper(Helper):
    def _first(self, x):
        return super()._first(x) + 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Parent):
    @decorated
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


class Grandchild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Parent()

    def forward(self, x):
        return self.inner.b(F.linear(x, self.inner.a.weight))


class Property(Parent):
    @property
    def matrix(self):
        return self.a.weight

    def forward(self, x):
        return self.b(F.linear(x, self.matrix))


class Loop(nn.Module):
    """Reads through a container, which no look at the code could follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.a = self.layers[0]

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias).tanh()
        return x


class Alias(Parent):
    def forward(self, x):
        first = self.a
        return self.b(F.linear(x, first.weight))


READS = [
    Functional,
    Variable,
    Transposed,
    Helper,
    Nested,
    Comprehension,
    Inherited,
    CallsSuper,
    HelperCallsSuper,
    Decorated,
    Grandchild,
    Property,
    Alias,
    Loop,
]


class AsksDtype(Parent):
    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype).to(self.a.weight.device)))


class AsksShape(Parent):
    def forward(self, x):
        if not x.shape[-1] == self.a.weight.shape[1] == self.a.weight.size(1):
            raise ValueError(x.shape)
        return self.b(self.a(x))


class ReadsElsewhere(Parent):
    def __init__(self) -> None:
        super().__init__()
        nn.init.ones_(self.a.weight)

    def penalty(self):
        return self.a.weight.abs().sum()

    def forward(self, x):
        return self.b(self.a(x))


class ReadsOnlyBias(Parent):
    def forward(self, x):
        return self.b(self.a(x)) + self.a.bias


@pytest.mark.parametrize("cls", READS, ids=lambda cls: cls.__name__)
def test_what_a_parent_reads_is_masked(cls):
    torch.manual_seed(0)
    model, x = cls(), torch.randn(2, 3)
    dense = model(x)
    kind = type(model)
    assert not dst_kernels.plan_sparsify(model).named("skip")
    dst_kernels.sparsify_(model)
    assert isinstance(model, kind) and torch.equal(model(x), dense)
    prune_half(model)
    layer = (model.inner if cls is Grandchild else model).a
    assert layer.weight is layer._parameters["weight"], "outside of a forward: the Parameter"
    output = model(x)
    output.square().sum().backward()
    assert layer.threshold.grad.any() and layer.weight.grad.any()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(x), output)
    final = dst_kernels.finalize_(copy.deepcopy(model))
    assert type(final) is kind and torch.equal(final(x), output) and not torch.equal(output, dense)
    assert type(dst_kernels.densify_(model)) is kind and torch.equal(model(x), dense)


class Writes(Parent):
    """Limits a weight that it also reads."""

    def forward(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        return self.b(F.linear(x, self.a.weight))


def test_what_a_parent_reads_and_writes_stays_dense():
    model = Writes()
    (skipped,) = [p for p in dst_kernels.plan_sparsify(model).layers if p.action == "skip"]
    assert skipped.name == "a" and "self.weight.data" in skipped.reason
    dst_kernels.sparsify_(model)(torch.ones(2, 3))
    assert model.a.weight.abs().max() <= 0.1


@pytest.mark.parametrize(
    "cls", [AsksDtype, AsksShape, ReadsElsewhere, ReadsOnlyBias], ids=lambda cls: cls.__name__
)
def test_is_masked(cls):
    model = dst_kernels.sparsify_(cls())
    assert isinstance(model.a, MaskedLinear) and isinstance(model.b, MaskedLinear)
    model(torch.randn(2, 3))
