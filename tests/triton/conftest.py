"""New memory is full of NaN and huge integers, so that whatever a kernel leaves out shows."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch._dynamo import trace_rules

ALLOCATORS = (
    (torch, ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)


@pytest.fixture
def overflows_are_found():
    """Keeps what the next fixture takes away, for tests with numbers that are large enough."""


@pytest.fixture(autouse=True)
def _quick_interpreter(request, monkeypatch):
    """Without computing every sum and product of 32-bit integers again in 64 bits.

    That takes nearly half of the interpreter's time, to find what overflows.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None and "overflows_are_found" not in request.fixturenames:
        builder = interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", options)


@pytest.fixture(scope="session")
def compiler_knows_torch():
    """torch's compiler lists torch's functions at first use, and must not list poisoned ones."""
    trace_rules.get_torch_obj_rule_map()


@pytest.fixture
def poisoned(monkeypatch, compiler_knows_torch):
    """What launchers get from torch's allocation functions."""

    def poisoning(allocate):
        return lambda *args, **options: poison_(allocate(*args, **options))

    for owner, names in ALLOCATORS:
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def fresh_plans():
    """Nothing is kept of how `pack` runs, for tests that change what that is made from."""
    from dst_kernels.backends.triton.pack import pack_plan

    pack_plan.cache_clear()
    yield
    pack_plan.cache_clear()


@pytest.fixture
def float32_products():
    """Sets how some products round float32; pytest's monkeypatch cannot put such a setting back."""
    before = []

    def choose(settings, precision):
        before.append((settings, settings.fp32_precision))
        settings.fp32_precision = precision

    yield choose
    for settings, precision in reversed(before):
        settings.fp32_precision = precision
