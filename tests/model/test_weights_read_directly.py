"""Layers whose parent computes with their weight stay dense; other uses do not matter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
def test_stays_dense(cls):
    model = cls()
    prefix = "inner." if cls is Grandchild else ""
    plan = dst_kernels.plan_sparsify(model)
    assert plan.named("convert") == [f"{prefix}b"]
    (skipped,) = [layer for layer in plan.layers if layer.action == "skip"]
    assert cls.__name__ in skipped.reason and "without calling it" in skipped.reason
    dst_kernels.sparsify_(model)
    assert type(model.get_submodule(f"{prefix}a")) is nn.Linear
    model(torch.randn(2, 3))


@pytest.mark.parametrize(
    "cls", [AsksDtype, AsksShape, ReadsElsewhere, ReadsOnlyBias], ids=lambda cls: cls.__name__
)
def test_is_masked(cls):
    model = dst_kernels.sparsify_(cls())
    assert isinstance(model.a, MaskedLinear) and isinstance(model.b, MaskedLinear)
    model(torch.randn(2, 3))


def test_attention_with_a_forward_on_top():
    class Mine(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(query, key, value, need_weights=False)[0]

    model = dst_kernels.sparsify_(Mine(4, 2, batch_first=True))
    assert not isinstance(model.out_proj, MaskedLinear)
