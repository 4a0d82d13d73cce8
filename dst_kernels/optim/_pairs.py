"""Find the layers that can leave their gradients to the optimizer."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor, nn

from ..nn import MaskedLayer
from ..nn.sources.deferred import alike
from ..ops.dtensor import is_dtensor, rows_are_whole

_NAMES = {"weight", "threshold"}  # not among the parameters where they are parametrized


@dataclass(frozen=True)
class Pair:
    """Hold a weight, its threshold and the layers that use them (several where they are tied).

    All layers have the same options, so the first one represents them.
    """

    weight: nn.Parameter
    threshold: nn.Parameter
    layers: tuple[MaskedLayer, ...]


def deferrable_pairs(model: nn.Module, optimized: Container[int]) -> list[Pair]:
    """Return the pairs whose weight is used by masked layers only, all with the same options.

    They also have one threshold per row, rows first in memory, and a weight whose id is in
    `optimized`. All other masked layers still compute dW and dt in their backward.
    """
    users = _users(model)
    pairs: dict[int, Pair] = {}
    for layer in model.modules():
        if not isinstance(layer, MaskedLayer) or not layer._parameters.keys() >= _NAMES:
            continue
        weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
        layers = [each for each in users[id(weight)] if isinstance(each, MaskedLayer)]
        if id(weight) in pairs or id(weight) not in optimized or not weight.requires_grad:
            continue
        if (
            layer.masking.granularity == "row"
            and layer.rows_first
            and _rows_are_contiguous(weight)
            and users[id(weight)] == users[id(threshold)] == layers
            and alike(layers)
            and not any(each._fixed for each in layers)
        ):
            pairs[id(weight)] = Pair(weight, threshold, tuple(layers))
    return list(pairs.values())


def receivers(model: nn.Module, optimized: Container[int]) -> list[MaskedLayer]:
    """Return the layers that can leave gradients of kept weights alone, if their mask is fixed.

    No other module uses their weight, whose id is in `optimized`.
    """
    users = _users(model)
    return [
        layer
        for layer in dict.fromkeys(model.modules())
        if isinstance(layer, MaskedLayer)
        and layer._keeps_rows
        and (weight := layer._parameters.get("weight")) is not None
        and id(weight) in optimized
        and len(users[id(weight)]) == 1
        and not is_dtensor(weight)
    ]


def _users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that have each parameter, by its id."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    return users


def _rows_are_contiguous(weight: Tensor) -> bool:
    """Return whether rows are contiguous, one after the other, and each is on one rank."""
    if is_dtensor(weight):
        if not rows_are_whole(weight):
            return False
        weight = weight.to_local()
    rows = weight.shape[0]
    return rows <= 1 or weight.stride(0) == weight.numel() // rows
