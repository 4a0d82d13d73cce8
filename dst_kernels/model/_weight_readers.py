"""Find layers whose parent reads their weight instead of calling them.

`nn.MultiheadAttention`, the Swin attentions and others pass `self.proj.weight` to a function. Such
a parent must read the masked weight (see `nn/reading.py`); if it also writes to weights, the layer
stays dense. Reads and writes are found in the bytecode of the parent's forward and of the methods
that it uses.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType

from torch import nn

_TORCHS = {
    nn.Module, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, *nn.Conv2d.__bases__, *nn.ConvTranspose2d.__bases__,
    nn.RNNBase, nn.LSTM, nn.GRU, nn.RNN,
}  # fmt: skip
# Attributes of a weight that can be read without computing with it.
_HARMLESS = {"device", "dim", "dtype", "is_cuda", "ndim", "numel", "requires_grad", "shape", "size"}
# Its fused path is switched off if layers are masked: see `_transformer_encoder.py`.
_EXEMPT = (nn.TransformerEncoderLayer,)


def bypassed_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Return each layer that must stay dense as its parent reads and writes weights, and why."""
    reasons = {}
    for parent in model.modules():
        cls: type = type(parent)
        write = None if isinstance(parent, _EXEMPT) else what_writes_its_weight(cls)
        if write is None:
            continue
        for path in _weights_read(cls):
            child: object = parent
            for name in path:
                child = getattr(child, name, None)
            if path and isinstance(child, nn.Module):
                reasons[child] = (
                    f"{cls.__name__} reads its weight without calling it, and has {write}"
                )
    return reasons


def is_reader(module: nn.Module) -> bool:
    """Return whether the forward of a module may compute with the weights of its submodules."""
    cls: type = type(module)
    if isinstance(module, _EXEMPT) or not any(True for _ in module.children()):
        return False
    return _mentions_weights(cls) and what_writes_its_weight(cls) is None


@functools.cache
def _mentions_weights(cls: type) -> bool:
    """Return whether a forward reads weights by name, and not only their shape or dtype."""
    for code in _reached(cls):
        for name, following in itertools.pairwise([*_attributes(code), ""]):
            if _is_weight(name) and following not in _HARMLESS:
                return True
    return False


@functools.cache
def calls_linear(cls: type) -> bool:
    """Return whether a forward that is not torch's mentions both `linear` and `weight`."""
    names = {name for code in _reached(cls) for name in code.co_names}
    return {"linear", "weight"} <= names


def _attributes(code: CodeType) -> list[str]:
    """Return the attributes that are loaded or stored, in their order."""
    return [
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
    ]


@functools.cache
def reads_a_weight(cls: type, method: str) -> bool:
    """Return whether a class reads weights by name in a method that is not torch's."""
    return any(_is_weight(name) for code in _reached(cls, method) for name in code.co_names)


@functools.cache
def what_writes_its_weight(cls: type) -> str | None:
    """Return the write in a forward that is not torch's, such as `self.weight.clamp_`, or None."""
    for code in _reached(cls):
        for name, following in itertools.pairwise([*_attributes(code), ""]):
            in_place = following.endswith("_") and not following.startswith("_")
            if name == "weight" and (following == "data" or in_place):
                return f"self.weight.{following}"
    return None


@functools.cache
def _weights_read(cls: type) -> frozenset[tuple[str, ...]]:
    """Return every path with `self.path.weight` in forward or in a method that it calls."""
    return frozenset(path for code in _reached(cls) for path in _paths_in(code))


def _reached(cls: type, start: str = "forward") -> Iterator[CodeType]:
    """Yield the code of a method and of every method it names, and so on, without torch's own."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for code in _codes(cls, waiting.pop()):
            yield code
            own = {n for n in code.co_names if n not in seen and not hasattr(nn.Module, n)}
            seen |= own
            waiting += own


def _codes(cls: type, name: str) -> Iterator[CodeType]:
    """Yield the code of the method or property `name` in every base: super() may call it."""
    for base in cls.__mro__:
        member = None if base in _TORCHS else base.__dict__.get(name)
        member = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        if code is not None:
            yield from _with_nested(code)


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _is_weight(name: str) -> bool:
    """Return whether an attribute has the name of weights of a layer or a recurrent module."""
    return name in ("weight", "_flat_weights", "all_weights") or name.startswith(
        ("weight_ih_l", "weight_hh_l", "weight_hr_l")
    )


def _paths_in(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the path a.b of every attribute chain self.a.b.weight that is computed with.

    Chains are followed through local names (`layer = self.a`), not through loops and containers.
    """
    aliases: dict[str, tuple[str, ...]] = {"self": ()}
    chain: tuple[str, ...] | None = None
    before: list[object] = []  # what was loaded ahead of the chain
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if chain is not None and name in ("LOAD_ATTR", "LOAD_METHOD"):
            chain += (value,)
            continue
        variables = value if isinstance(value, tuple) else (value,)  # some instructions take two
        if name.startswith("STORE_FAST"):
            aliases.pop(variables[0], None)
            if chain is not None:
                aliases[variables[0]] = chain
        elif (
            chain is not None
            and any(map(_is_weight, chain[1:]))
            and "isinstance" not in before[-2:]
        ):
            end = next(i for i, each in enumerate(chain) if i and _is_weight(each))
            if not _HARMLESS.intersection(chain[end + 1 : end + 2]):
                yield chain[:end]
        before.append(value if chain is None else None)
        loads = "LOAD_FAST" in name or name == "LOAD_DEREF"
        chain = aliases.get(variables[-1]) if loads else None
