"""From masked layers back to plain torch.nn."""

from __future__ import annotations

from torch import nn

from ..nn import MaskedModule, ungroup_
from ._replace import replace_modules
from ._transformer_encoder import restore_fast_path

__all__ = ["FORMATS", "finalize_"]

FORMATS = ("dense",)


def finalize_(model: nn.Module, format: str = "dense") -> nn.Module:
    """Replace every masked layer by the plain layer with weight * mask baked in.

    In place; returns the model, or its replacement where the model itself is a masked layer.
    Outputs stay the same (bit for bit in float32 on the reference path). Weights that masked
    layers shared stay shared. A model without masked layers comes back as it is.

    Raises ValueError for a format other than "dense", RuntimeError for sharded weights.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, but is {format!r}")
    baked: dict[int, nn.Parameter] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, MaskedModule):
            dense = replacements[module] = module.to_dense()
            for part in module.masked_weights():
                own = getattr(dense, part.name)
                setattr(dense, part.name, baked.setdefault(id(part.weight), own))
    for module in model.modules():
        ungroup_(module)
    model = replace_modules(model, replacements)
    restore_fast_path(model)
    return model
