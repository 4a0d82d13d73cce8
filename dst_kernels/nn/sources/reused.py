"""Keep a layer's masked weight for several forwards, while the user says that it does not change.

Only the user can know that: PyTorch does not record writes through `.data`, and fused optimizers do
not increase version counters. So the user opens a scope. Inside it, every change that can be seen
still leads to a new copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...autograd import MaskOptions, Packed, pack
from .stamp import memory_of, stamp

if TYPE_CHECKING:
    from ..layer import MaskedLayer


class Copies:
    """Hold one layer's masked weights by compute dtype, and what they were made from."""

    def __init__(self, layer: MaskedLayer) -> None:
        self._layer = layer
        self._made: dict[torch.dtype, tuple[tuple, Packed]] = {}
        self._memory: tuple[Tensor, ...] = ()

    def clear(self) -> None:
        self._made.clear()
        self._memory = ()

    def recall(
        self, weight: Tensor, threshold: Tensor, options: MaskOptions, dtype: torch.dtype
    ) -> Packed:
        """Return the copy in `dtype`; make a new one if weight or threshold are seen to change."""
        now = stamp(self._layer)
        if now is None:
            return pack(weight, threshold, options, dtype)
        # A tensor made in inference mode could not be saved for a backward outside it.
        state = now, options.backend, torch.is_inference_mode_enabled()
        known = self._made.get(dtype)
        if known is not None and known[0] == state:
            return known[1]
        packed = pack(weight, threshold, options, dtype)
        self._memory = memory_of(self._layer)
        still_valid = {key: made for key, made in self._made.items() if made[0] == state}
        self._made = {**still_valid, dtype: (state, packed)}
        return packed

    def threshold_was_committed(self, before: tuple | None) -> None:
        """Keep copies that were valid `before` a commit: it writes the threshold they came from."""
        now = stamp(self._layer)
        self._made = {
            dtype: ((now if made_from == before else made_from, *rest), packed)
            for dtype, ((made_from, *rest), packed) in self._made.items()
        }


# By layer, while a scope is open. As an attribute, copies of the layer would have it, too.
open_scopes: WeakKeyDictionary[MaskedLayer, Copies] = WeakKeyDictionary()


def copies_of(layer: MaskedLayer) -> Copies | None:
    """Return the copies of a layer in an open scope; None outside one, or in torch.func."""
    if not open_scopes or torch._C._are_functorch_transforms_active():
        return None
    return open_scopes.get(layer)


def open_for(layers: Iterable[MaskedLayer]) -> dict[MaskedLayer, Copies]:
    """Open a scope for layers that are in no outer one; return their copies."""
    opened = {layer: Copies(layer) for layer in layers if layer not in open_scopes}
    open_scopes.update(opened)
    return opened


def close(opened: Iterable[MaskedLayer]) -> None:
    """Close the scope that `open_for` opened."""
    for layer in opened:
        open_scopes.pop(layer, None)
