"""Find what is masked in a model."""

from __future__ import annotations

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
