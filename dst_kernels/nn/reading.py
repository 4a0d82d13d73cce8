"""Mask what a forward reads: a masked weight's attribute is W * M while that forward runs.

Some forwards compute with `self.weight`, `self.proj.weight` or `self.experts` themselves: those of
a user's subclass of a layer, of a parent that passes its children's weights to a function, of a
module with its own Parameters. While such a forward runs on a thread, the attribute is the masked
weight on that thread, computed once. At all other times it is the Parameter, so that initialisers,
hooks, weight tying and adapter merges find it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import is_exporting
from .tools import recorded_if_traced, refuse_training


class _Running(threading.local):
    """Hold what forwards on this thread may read, with W * M and its version once it was read."""

    def __init__(self) -> None:
        self.masked: dict[tuple[nn.Module, str], tuple[Tensor, int] | None] = {}


_running = _Running()


class Readable(property):
    """Define the attribute of a masked weight."""

    def __init__(self, name: str) -> None:
        def read(module: nn.Module) -> Tensor:  # plain functions, which the compiler can trace
            return _read(name, module)

        def write(module: nn.Module, value: Tensor) -> None:
            module.__dict__[name] = value

        def delete(module: nn.Module) -> None:  # torch.nn.utils.prune.remove does
            if name not in module.__dict__:
                raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
            del module.__dict__[name]

        super().__init__(read, write, delete)


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """Return a weight as it is stored, or as a parametrization or a hook computes it."""
    weight = module._parameters.get(name, module.__dict__.get(name))
    if weight is not None:
        return weight
    for cls in type(module).__mro__:
        computed = cls.__dict__.get(name)
        if isinstance(computed, property) and not isinstance(computed, Readable):
            return computed.fget(module)  # type: ignore[misc]  # not __get__, which no compiler reads
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


def _read(name: str, module: Any) -> Tensor:
    weight = stored_weight(module, name)
    if torch.compiler.is_compiling():  # a compiled forward reads a weight only to compute with it
        if is_exporting():
            refuse_training(module)
        is_read = module.__dict__.get("_is_read") or name in type(module)._own_reads
        return module._weight_to_compute_with(name, weight) if is_read else weight
    running, key = _running.masked, (module, name)
    if not running or key not in running:
        return weight
    read = running[key]
    if read is None:
        masked = recorded_if_traced(module, name)
        if masked is None:
            masked = module._weight_to_compute_with(name, weight)
        read = running[key] = masked, 0 if masked.is_inference() else masked._version
    return read[0]


def members_for_reading(dense: type[nn.Module], names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the members of a class, made from `dense`, whose forward reads masked weights.

    It reads its own weights of these `names`, and those that an instance lists in `_reads`.
    """

    @functools.wraps(dense.forward)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return dense.forward(self, *args, **kwargs)
        hidden = [name for name in names if not isinstance(getattr(type(self), name), Readable)]
        if hidden:
            raise RuntimeError(
                f"{type(self).__name__} has a forward of its own and a parametrized {hidden[0]}, "
                "which would not be masked: remove the parametrization or call dst_kernels.densify_"
            )
        running = _running.masked
        keys = [(self, name) for name in names] + self.__dict__.get("_reads", [])
        keys = [key for key in keys if key not in running]
        running.update(dict.fromkeys(keys))
        try:
            output = dense.forward(self, *args, **kwargs)
            for key in keys:
                _check_unwritten(key, running[key])
        finally:
            for key in keys:
                del running[key]
        return output

    properties = {name: Readable(name) for name in names}
    return {"forward": forward, "_own_reads": frozenset(names), **properties}


def _check_unwritten(key: tuple[nn.Module, str], read: tuple[Tensor, int] | None) -> None:
    module, name = key
    if read is not None and not read[0].is_inference() and read[0]._version != read[1]:
        raise RuntimeError(
            f"a forward writes to {name} of {type(module).__name__}, which is the masked weight "
            "there, so the write is lost: write before the forward, or keep the layer dense "
            "(filter_fn)"
        )
