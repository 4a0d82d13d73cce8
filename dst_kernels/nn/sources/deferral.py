"""What layers share with an optimizer of `dst_kernels.optim`, which makes their gradients.

The backward of such a layer leaves the dense G = dL/d(W * M) as the weight's gradient, and nothing
for the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import functional as F

if TYPE_CHECKING:
    from ..layer import MaskedLayer

__all__ = ["Deferral"]


@dataclass(slots=True)
class _Pack:
    """W * M, and what it was made from."""

    masked: Tensor
    made_from: tuple
    committed: bool


class Deferral:
    """The packed weights, which each step renews. Layers that share a weight share its pack.

    Holds for the parameters that the layers have when it is made, not for what takes their place.
    """

    def __init__(self, layers: Iterable[MaskedLayer]) -> None:
        self._layers = {layer: (layer.weight, layer.threshold) for layer in layers}
        self._packs: dict[int, _Pack] = {}
        for layer in self._layers:
            layer._deferral = self

    def serves(self, layer: MaskedLayer) -> bool:
        """Whether weight and threshold are those of then: none that functional_call swaps in, that
        were assigned or that a parametrization computes.

        FSDP2 and DataParallel do swap parameters, and hand their gradients on.
        """
        if layer._sharded_threshold is not None or layer._is_replica:
            return True
        mine, now = self._layers.get(layer), layer._parameters
        return mine is not None and now.get("weight") is mine[0] and now.get("threshold") is mine[1]

    def release(self, layers: Iterable[MaskedLayer] | None = None) -> None:
        """From now on `layers` (None: all) have gradients of their own again, in their own dtype.

        A G that waits in `.grad` for a step is dropped: another optimizer would mistake it for dW.
        """
        for layer in list(self._layers if layers is None else layers):
            dense = self.serves(layer)
            weight, _ = self._layers.pop(layer)
            self._packs.pop(id(weight), None)
            if layer._deferral is not self:
                continue
            layer._deferral = None
            if dense:
                weight.grad = None
            if weight.grad_dtype != weight.dtype:
                grad, weight.grad = weight.grad, None
                weight.grad_dtype = weight.dtype
                weight.grad = None if grad is None else grad.to(weight.dtype)

    def fresh(self, layer: MaskedLayer) -> Tensor | None:
        """W * M if weight and threshold are as they were when it was made.

        In training a reset by the guard must also have been written into the threshold.
        """
        pack = self._valid(layer)
        if pack is None:
            return None
        if layer.training and layer.reset_ratio is not None and not pack.committed:
            return None
        return pack.masked

    def commit(self, layer: MaskedLayer) -> None:
        """Write a reset into the threshold, if the last forward did not: one in evaluation mode.

        That forward's W * M stays what it is.
        """
        pack = self._packs.get(id(layer._parameters["weight"]))
        if layer.reset_ratio is None or (layer.training and (pack is None or pack.committed)):
            return
        pack = self._valid(layer)
        if pack is not None and pack.committed:
            return
        weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
        with torch.no_grad():
            threshold.copy_(F.effective_threshold(weight, threshold, reset_ratio=layer.reset_ratio))
        if pack is not None:
            self.store(layer, pack.masked, committed=True)

    def _valid(self, layer: MaskedLayer) -> _Pack | None:
        pack = self._packs.get(id(layer._parameters["weight"]))
        return None if pack is None or pack.made_from != _state(layer) else pack

    def store(self, layer: MaskedLayer, masked: Tensor, committed: bool) -> Tensor:
        """Returns the tensor that holds it from now on: the one from before, where that fits.

        A captured CUDA graph goes on reading where it was captured.
        """
        key = id(layer._parameters["weight"])
        pack = self._packs.get(key)
        if pack is not None and pack.masked is not masked and _alike(pack.masked, masked):
            masked = pack.masked.copy_(masked)
        self._packs[key] = _Pack(masked, _state(layer), committed)
        return masked


def _alike(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.device == other.device
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _state(layer: MaskedLayer) -> tuple:
    """What shows that parameters were changed or replaced."""
    weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
    return (
        weight._version, weight.data_ptr(), weight.stride(),
        threshold._version, threshold.data_ptr(), layer.reset_ratio,
    )  # fmt: skip
