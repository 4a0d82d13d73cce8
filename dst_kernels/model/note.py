"""Note in a transformers model's config what is masked, so that it can be saved and loaded.

Nothing here imports transformers; `dst_kernels.integrations.transformers` reads the note.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import MaskedModule
from ..nn.weight import is_of_mask
from .config import SparsifyConfig

NOTE = "dst_kernels"  # in the model's config, and so in config.json


def note_masks_(model: nn.Module, config: SparsifyConfig) -> None:
    """Note what is masked, and how, in the config; tie the thresholds of tied weights."""
    of_model = _config(model)
    if of_model is None:
        return
    names = [name for name, each in model.named_modules() if isinstance(each, MaskedModule)]
    setattr(of_model, NOTE, {"config": config.to_dict(), "modules": names})
    of_class: Any = getattr(model, "_tied_weights_keys", None) or {}
    thresholds = {}
    for target in of_class:
        source = of_class[target] if isinstance(of_class, dict) else target
        pair = _threshold(model, target), _threshold(model, source)
        if all(pair):
            thresholds[pair[0]] = pair[1]
    if thresholds:  # of the model, not of its class
        is_dict = isinstance(of_class, dict)
        tied: Any = {**of_class, **thresholds} if is_dict else [*of_class, *thresholds]
        model.__dict__["_tied_weights_keys"] = tied
        if "all_tied_weights_keys" in vars(model):
            vars(model)["all_tied_weights_keys"].update(thresholds)


def forget_masks_(model: nn.Module) -> None:
    """Undo `note_masks_`."""
    of_model = _config(model)
    if hasattr(of_model, NOTE):
        delattr(of_model, NOTE)
        vars(model).pop("_tied_weights_keys", None)
        tied = vars(model).get("all_tied_weights_keys", {})
        for key in [key for key in tied if is_of_mask(key, "threshold")]:
            del tied[key]


def _config(model: nn.Module) -> Any:
    config = vars(model).get("config")
    return config if hasattr(config, "save_pretrained") else None


def _threshold(model: nn.Module, weight: str) -> str | None:
    """Return the name of a weight's threshold, or None for one that is not masked."""
    name, _, attribute = weight.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(name)
    if not isinstance(module, MaskedModule):
        return None
    for part in module.masked_weights():
        if part.name == attribute:
            return f"{name}.{part.threshold_name}".lstrip(".")
    return None
