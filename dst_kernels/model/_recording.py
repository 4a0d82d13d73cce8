"""Record which functions of torch a model calls for an example, and where each tensor goes.

The model runs as it is, in eager mode, so every model that runs can be recorded. What is seen are
calls of torch's functions and methods from Python. A tensor that leaves this view (an output, a
hook's argument, something that the model or its author keeps) counts as escaped.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PROPERTIES = {
    "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_nested",
    "is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "nbytes", "ndim", "requires_grad",
    "shape",
}  # fmt: skip
_METHODS = {
    getattr(torch.Tensor, name)
    for name in (
        "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
        "is_floating_point", "ndimension", "nelement", "numel", "size", "stride",
    )
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Value:
    """What a tensor held at one point of the run; an operation in place makes a new value."""

    shape: torch.Size
    dtype: torch.dtype
    uses: int = 0
    escaped: bool = False


@dataclasses.dataclass(eq=False)
class Call:
    """One call: tensors are Values in it, but stored ones (Parameters, buffers) stay themselves."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    result: object
    layer: nn.Module | None  # whose forward made this call, if it is one of those asked for


@dataclasses.dataclass(eq=False)
class Recording:
    """All calls of a run that took a tensor, in their order."""

    calls: list[Call]
    uses: Counter[int]  # by the id of a Parameter or buffer: in how many places of the calls it is


def record(
    model: nn.Module, run: Callable[[nn.Module], object], layers: tuple[type, ...]
) -> Recording:
    """Do `run(model)` and return what was called; `layers`: exact classes of layers to tell apart.

    Modules that have hooks count as unseen: what goes into them and comes out escapes.
    """
    recorder = _Recorder(model)
    handles = []
    for module in model.modules():
        if any(getattr(module, name) for name in _HOOKS):
            handles.append(module.register_forward_hook(recorder.escape, with_kwargs=True))
        if type(module) in layers:
            handles.append(module.register_forward_pre_hook(recorder.enter))
            handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            output = run(model)
    finally:
        for handle in handles:
            handle.remove()
    recorder.let_go()
    del output  # only now: what it holds has escaped
    return Recording(recorder.calls, recorder.uses)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.uses: Counter[int] = Counter()
        self._layer: nn.Module | None = None
        self._stored = {id(t) for t in (*model.parameters(), *model.buffers())}
        # By id; holding the tensor keeps its id from being given to another.
        self._values: dict[int, tuple[Tensor, Value, int]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METHODS or (
            getattr(func, "__name__", "") == "__get__"
            and getattr(func.__self__, "__name__", "") in _PROPERTIES
        ):
            return func(*args, **kwargs)
        if not any(True for _ in tensors_in((args, kwargs), Tensor)):
            return func(*args, **kwargs)
        placed_args, placed_kwargs = self._placed(args), self._placed(kwargs)
        for value in tensors_in((placed_args, placed_kwargs), Value):
            value.uses += 1
        for tensor in tensors_in((placed_args, placed_kwargs), Tensor):
            self.uses[id(tensor)] += 1
        result = func(*args, **kwargs)
        for tensor in tensors_in(result, Tensor):
            if id(tensor) not in self._stored:
                self._new(tensor)
        call = Call(func, placed_args, placed_kwargs, self._placed(result), self._layer)
        self.calls.append(call)
        return result

    def enter(self, module, args) -> None:
        self._layer = module

    def leave(self, module, args, output) -> None:
        self._layer = None

    def escape(self, module, args, kwargs, output) -> None:
        for value in tensors_in(self._placed((args, kwargs, output)), Value):
            value.escaped = True

    def let_go(self) -> None:
        """Drop all tensors; those that stay alive are held by somebody else."""
        held = [(weakref.ref(tensor), value) for tensor, value, _ in self._values.values()]
        self._values.clear()
        for tensor, value in held:
            value.escaped |= tensor() is not None

    def _placed(self, tree: object) -> Any:
        if isinstance(tree, Tensor):
            return tree if id(tree) in self._stored else self._value(tree)
        if isinstance(tree, (list, tuple)):
            return tuple(self._placed(each) for each in tree)
        if isinstance(tree, dict):
            return {key: self._placed(each) for key, each in tree.items()}
        return tree

    def _value(self, tensor: Tensor) -> Value:
        known = self._values.get(id(tensor))
        if known is not None:
            if known[2] == _version(tensor):
                return known[1]
            known[1].escaped = True  # changed by an operation on an alias, or by an unknown one
        return self._new(tensor)

    def _new(self, tensor: Tensor) -> Value:
        value = Value(tensor.shape, tensor.dtype, escaped=tensor.is_inference())
        self._values[id(tensor)] = tensor, value, _version(tensor)
        return value


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(tree: object, kind: type) -> Iterator[Any]:
    """Yield all instances of `kind` in nested lists, tuples and dictionaries."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from tensors_in(each, kind)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from tensors_in(each, kind)
