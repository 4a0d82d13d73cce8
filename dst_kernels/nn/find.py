"""Find what is masked in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..arguments import require_module
from .layer import MaskedLayer
from .module import MaskedModule
from .weight import MaskedWeight


def named_masked_weights(model: nn.Module) -> list[tuple[str, MaskedWeight]]:
    """Return (name, weight) of every masked weight of every module, each module once.

    The weight of a masked layer has the layer's name. Raises TypeError if `model` is no module,
    ValueError if nothing in it is masked.
    """
    require_module(model)
    found = [
        (name if isinstance(module, MaskedLayer) else f"{name}.{part.name}".lstrip("."), part)
        for name, module in model.named_modules()
        if isinstance(module, MaskedModule)
        for part in module.masked_weights()
    ]
    if not found:
        raise ValueError(
            f"model ({type(model).__name__}) has no masked layers: convert it with "
            "dst_kernels.sparsify_ or build it from dst_kernels.nn"
        )
    return found


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    """Return every masked layer once; raise what `named_masked_weights` does."""
    modules = {part.module: None for _, part in named_masked_weights(model)}
    return [module for module in modules if isinstance(module, MaskedLayer)]


def masked_by_key(model: nn.Module) -> dict[str, MaskedWeight]:
    """Return every masked weight, under each name that it may have in a state dict."""
    return {
        f"{name}.{part.name}".lstrip("."): part
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MaskedModule)
        for part in module.masked_weights()
    }


def beside(key: str, name: str) -> str:
    """Return the name in a state dict of what the module of `key` calls `name`."""
    module, dot, _ = key.rpartition(".")
    return f"{module}{dot}{name}"


def names_of_masks(masked: Mapping[str, MaskedWeight]) -> set[str]:
    """Return the names in a state dict of the thresholds and fixed masks of these weights."""
    return {
        beside(key, name)
        for key, part in masked.items()
        for name in (part.threshold_name, part.fixed_mask_name)
    }
