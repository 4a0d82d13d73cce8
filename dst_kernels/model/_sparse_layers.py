"""Turn dense layers into sparse ones, as the same objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..nn import MaskedModule
from ..nn.sparse import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear, wins
from .compact import Undo

_KINDS: dict[type, tuple[type[SparseLayer], str]] = {
    nn.Linear: (SparseLinear, "linear"),
    nn.Conv1d: (SparseConv1d, "conv1d"),
    nn.Conv2d: (SparseConv2d, "conv2d"),
}


def can_be_sparse(model: nn.Module) -> list[nn.Module]:
    """Return the masked layers that have a sparse form and whose weight nobody else reads."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return [
        module
        for module in model.modules()
        if isinstance(module, MaskedModule)
        and module.dense_class in _KINDS
        and "weight" in module._parameters
        and owners[id(module.weight)] == 1
        and not module.__dict__.keys() & {"_is_read", "forward"}
    ]


def sparse_(
    model: nn.Module,
    layers: Iterable[nn.Module],
    everywhere: bool,
    positions: Mapping[nn.Module, int],
    lines: list[str],
    undo: list[Undo],
) -> None:
    """Store the weights of layers without zeros, in place, `everywhere` or where that is faster.

    `positions`: how many convolutions compute of one image, as far as it is known. Add a line on
    each layer, and what undoes it.
    """
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        sparse, kind = _KINDS[type(layer)]
        weight: Any = layer.weight
        rows, columns = weight.flatten(1).shape
        kept = int(weight.count_nonzero())
        sizes = rows, columns, kept, weight.device, weight.dtype
        if everywhere or wins(*sizes, kind, positions.get(layer)):
            undo.append(become_(layer, sparse.from_dense(layer)))
            lines.append(f"{names[layer]}: {sparse.__name__}, {kept} of {weight.numel()} weights")


def become_(layer: nn.Module, other: nn.Module) -> Undo:
    """Give a module the class and the contents of another one; its hooks stay."""
    undo = partial(_restore_, layer, type(layer), dict(layer.__dict__))
    hooks = {name: value for name, value in layer.__dict__.items() if "hook" in name}
    layer.__class__ = type(other)
    layer.__dict__.update({**other.__dict__, **hooks})
    return undo


def _restore_(layer: nn.Module, cls: type[nn.Module], contents: dict[str, Any]) -> None:
    layer.__class__ = cls
    layer.__dict__.clear()
    layer.__dict__.update(contents)
