"""Keeping a layer's masked weight for several forwards, while the user says it stays as it is.

Only the user can know that: writes through `.data` leave no trace, and fused optimizers do not
count their versions up. Hence a scope, opened by name; inside it every change that can be seen
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
    """One layer's masked weights by compute dtype, and what they were made from."""

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
        """Return the copy in `dtype`, a new one where weight or threshold were seen to change."""
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
        """Go on with copies that were valid `before`: a commit writes what they were made with."""
        now = stamp(self._layer)
        self._made = {
            dtype: ((now if made_from == before else made_from, *rest), packed)
            for dtype, ((made_from, *rest), packed) in self._made.items()
        }


# By layer, while a scope is open. Not an attribute of the layer: copies of it would have it too.
open_scopes: WeakKeyDictionary[MaskedLayer, Copies] = WeakKeyDictionary()


def copies_of(layer: MaskedLayer) -> Copies | None:
    """Return the copies of a layer in an open scope; None outside, and inside torch.func."""
    if not open_scopes or torch._C._are_functorch_transforms_active():
        return None
    return open_scopes.get(layer)


def open_for(layers: Iterable[MaskedLayer]) -> dict[MaskedLayer, Copies]:
    """Open a scope; layers of an outer scope go on with its copies, and are not in the result."""
    opened = {layer: Copies(layer) for layer in layers if layer not in open_scopes}
    open_scopes.update(opened)
    return opened


def close(opened: Iterable[MaskedLayer]) -> None:
    """Close the scope that `open_for` opened."""
    for layer in opened:
        open_scopes.pop(layer, None)
