"""Finding the masked layers of a model."""

from __future__ import annotations

from torch import nn

from ._masked import MaskedLayer

__all__ = ["named_masked_layers"]


def named_masked_layers(model: nn.Module) -> list[tuple[str, MaskedLayer]]:
    """(name, layer) of every masked layer, each layer once. ValueError where there are none."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, MaskedLayer)
    ]
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no masked layers: convert it with "
            "dst_kernels.sparsify_ or build it from dst_kernels.nn"
        )
    return layers
