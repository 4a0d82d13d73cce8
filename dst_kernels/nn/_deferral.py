"""What layers share with an optimizer of `dst_kernels.optim`, which makes their gradients.

The backward of such a layer leaves the dense G = dL/d(W * M) as the weight's gradient, and nothing
for the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ._masked import MaskedLayer

__all__ = ["Deferral"]


@dataclass(slots=True)
class _Pack:
    """W * M, and what it was made from."""

    masked: Tensor
    made_from: tuple
    committed: bool


class Deferral:
    """The packed weights, which each step renews. Layers that share a weight share its pack."""

    def __init__(self, layers: Iterable[MaskedLayer]) -> None:
        self._layers = list(layers)
        self._packs: dict[int, _Pack] = {}
        for layer in self._layers:
            layer._deferral = self

    def release(self) -> None:
        """From now on the layers have gradients of their own again."""
        for layer in self._layers:
            if layer._deferral is self:
                layer._deferral = None
        self._layers, self._packs = [], {}

    def fresh(self, layer: MaskedLayer) -> Tensor | None:
        """W * M if weight and threshold are as they were when it was made.

        In training a reset by the guard must also have been written into the threshold.
        """
        pack = self._packs.get(id(layer._parameters["weight"]))
        if pack is None or pack.made_from != _state(layer):
            return None
        if layer.training and layer.reset_ratio is not None and not pack.committed:
            return None
        return pack.masked

    def is_committed(self, layer: MaskedLayer) -> bool:
        """Whether the threshold is known to be the effective one."""
        pack = self._packs.get(id(layer._parameters["weight"]))
        return pack is not None and pack.committed and pack.made_from == _state(layer)

    def store(self, layer: MaskedLayer, masked: Tensor, committed: bool) -> None:
        key = id(layer._parameters["weight"])
        self._packs[key] = _Pack(masked, _state(layer), committed)


def _state(layer: MaskedLayer) -> tuple:
    """What shows that parameters were changed or replaced."""
    weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
    return (
        weight._version, weight.data_ptr(), weight.stride(),
        threshold._version, threshold.data_ptr(), layer.reset_ratio,
    )  # fmt: skip
