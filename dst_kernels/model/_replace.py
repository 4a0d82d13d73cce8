"""Putting modules in the place of others, everywhere they stand."""

from __future__ import annotations

from torch import nn

__all__ = ["replace_modules"]


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Swap in place; returns the model, or the root's replacement."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)
