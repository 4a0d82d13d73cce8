"""Layers whose parent reads their weight instead of calling them.

`nn.MultiheadAttention`, the Swin attentions and others hand `self.proj.weight` to a function. A
masked layer in that place would be ignored without a word, so conversion leaves it dense. Such
reads are found in the bytecode of the parent's forward and of the methods it uses.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

__all__ = ["bypassed_layers"]

# What may be asked of a weight without computing with it.
_HARMLESS = {"device", "dim", "dtype", "is_cuda", "ndim", "numel", "requires_grad", "shape", "size"}
# Its fused path is kept off where layers are masked: see `_encoder.py`.
_EXEMPT = (nn.TransformerEncoderLayer,)


def bypassed_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Each such layer with the reason to skip it."""
    reasons = {}
    for parent in model.modules():
        if isinstance(parent, _EXEMPT):
            continue
        for path in _weights_read(type(parent)):
            child: object = parent
            for name in path:
                child = getattr(child, name, None)
            if isinstance(child, nn.Module):
                reasons[child] = f"{type(parent).__name__} reads its weight without calling it"
    return reasons


@functools.cache
def _weights_read(cls: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Every path with `self.path.weight` in forward or in a method reached from it."""
    paths: set[tuple[str, ...]] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = inspect.unwrap(getattr(cls, waiting.pop(), None) or _nothing)
        for code in _with_nested(getattr(method, "__code__", _nothing.__code__)):
            paths.update(_paths_in(code))
            own = {n for n in code.co_names if n not in seen and not hasattr(nn.Module, n)}
            seen |= own
            waiting += [name for name in own if callable(getattr(cls, name, None))]
    return frozenset(paths)


def _nothing() -> None:
    pass


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _paths_in(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Attribute chains self.a.b.weight, by the names their instructions load one after another."""
    names: list[object] = []
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        loads_two = isinstance(value, tuple) and "FAST" in instruction.opname
        names += value if loads_two else [value]
    names.append(None)
    for end, name in enumerate(names[:-1]):
        if name == "weight" and names[end + 1] not in _HARMLESS:
            start = end
            while start > 0 and isinstance(names[start], str) and names[start] != "self":
                start -= 1
            asked_only = "isinstance" in names[max(start - 2, 0) : start]
            if names[start] == "self" and end - start >= 2 and not asked_only:
                yield tuple(names[start + 1 : end])
