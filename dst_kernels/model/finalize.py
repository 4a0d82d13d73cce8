"""Turn masked layers back into dense ones, with the weights masked or as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import require_module
from ..nn import MaskedModule, ungroup_
from ..nn.in_place import (
    drop_parametrizations_,
    is_parametrized_since,
    stop_reading_,
    unmask_module_,
    why_not_unmasked,
)
from ._transformer_encoder import restore_fast_path
from .note import forget_masks_

FORMATS = ("dense",)


def finalize_(model: nn.Module, format: str = "dense") -> nn.Module:
    """Turn every masked layer into a dense one whose weight is weight * mask; return `model`.

    In place: modules and Parameters stay the same objects, so every reference to them stays valid.
    Outputs stay the same (bit for bit in float32 on the reference path). Weights that layers share
    stay shared. A model without masked layers is returned unchanged.

    Parametrizations of masked layers are removed: their masked result is the weight.

    Raises TypeError if `model` is no module, ValueError for a format other than "dense",
    RuntimeError for sharded weights and for those that a hook computes since conversion; nothing
    has changed then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, but is {format!r}")
    return _without_masks(model, bake=True)


def densify_(model: nn.Module) -> nn.Module:
    """Turn every masked layer back into the dense layer it was, unmasked; return `model`.

    This undoes `sparsify_`, in place: thresholds are dropped, and pruned weights have their stored
    values again, while `finalize_` sets them to 0. It raises the errors of `finalize_`, and one for
    layers with a parametrization since conversion.
    """
    return _without_masks(model, bake=False)


def _without_masks(model: nn.Module, bake: bool) -> nn.Module:
    require_module(model)
    masked = {n: m for n, m in model.named_modules() if isinstance(m, MaskedModule)}
    for name, module in masked.items():
        reason = why_not_unmasked(module, baked=bake)
        if reason is not None:
            raise RuntimeError(f"{name or 'the model'} ({type(module).__name__}): {reason}")
    computed: list[tuple[nn.Module, str, Tensor]] = []  # by parametrizations, removed below
    if bake:
        drop_parametrizations_(m for m in masked.values() if is_parametrized_since(m))
        weights = {id(part.stored): part for m in masked.values() for part in m.masked_weights()}
        with torch.no_grad():
            for part in weights.values():
                baked = part.baked()
                if part.name in part.module._parameters:
                    part.weight.copy_(baked)
                else:
                    computed.append((part.module, part.name, baked))
    for each in list(model.modules()):
        ungroup_(each)
    for module in masked.values():
        unmask_module_(module)
    for each in list(model.modules()):
        stop_reading_(each)
    for each, name, baked in computed:
        # Not `remove_parametrizations`: it takes the property from the class, which copies share.
        each.__class__ = type(each).__bases__[0]
        del each._modules["parametrizations"]
        each.register_parameter(name, nn.Parameter(baked))
    restore_fast_path(model)
    forget_masks_(model)
    return model
