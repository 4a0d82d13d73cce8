"""Decide where a layer's masked weight W * M comes from.

* fresh: the layer masks its weight in its forward; the default.
* reused: the layer keeps what it masked for several forwards, inside `weights_unchanged`.
* grouped: a hook on the model masks many layers in one launch, before the model's forward.
* deferred: an optimizer's step made it; the next step makes dW and dt from the gradient of W * M.
* fixed: the layer takes W where a boolean mask is True (`MaskedWeight.set_fixed_mask`).

`attached_weight` returns what a group made for the current call; without that, `source_of` says how
the layer makes W * M itself. `stamp.py` says what is stale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...autograd import COMMITTED, FRESH, MaskedWeightInMemory, WeightSource
from .compiled import can_take, made_by_step
from .deferred import Deferral, deferral_of
from .grouped import attached_weight
from .reused import copies_of, open_scopes

if TYPE_CHECKING:
    from ..layer import MaskedLayer

__all__ = [
    "Deferral",
    "attached_weight",
    "can_take",
    "copies_of",
    "deferral_of",
    "known_of",
    "source_of",
]


def known_of(layer: MaskedLayer, attached: Tensor) -> MaskedWeightInMemory | None:
    """Return what is known of an attached W * M that an optimizer's step made, else None."""
    deferral = layer._deferral
    return None if deferral is None else deferral.in_memory(layer, attached)


def source_of(layer: MaskedLayer, commits: bool) -> WeightSource:
    """Return how the layer itself makes the masked weight of this call.

    `commits`: whether the call writes resets by the guard into the threshold.
    """
    dense_gradient = layer._deferral is not None and deferral_of(layer) is not None
    if layer._sharded_thresholds:
        return WeightSource(None, dense_gradient, keep=False)
    recall = None
    if torch.compiler.is_compiling():
        packs = layer.masking.path in ("auto", "packed", "sparse")
        if dense_gradient and packs and layer.training and torch.is_grad_enabled():
            recall = lambda weight, threshold, _, dtype: made_by_step(  # noqa: E731
                layer, weight, threshold, dtype
            )
    elif open_scopes:
        copies = copies_of(layer)
        recall = None if copies is None else copies.recall
    if recall is None and not dense_gradient:
        return COMMITTED if commits else FRESH
    return WeightSource(recall, dense_gradient)
