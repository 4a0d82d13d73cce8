"""Turn masked layers back into dense ones, or into smaller and sparse ones for inference."""

from __future__ import annotations

import logging

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
from ._example import Example
from ._sparse_layers import can_be_sparse, sparse_
from ._transformer_encoder import avoid_fast_path, restore_fast_path
from .compact import Undo, compact_
from .note import forget_masks_

FORMATS = ("dense", "compact", "csr", "auto")

logger = logging.getLogger(__name__)


def finalize_(model: nn.Module, format: str = "dense", example_input: object = None) -> nn.Module:
    """Turn every masked layer into a dense one whose weight is weight * mask; return `model`.

    In place: modules and Parameters stay the same objects, so every reference to them stays valid.
    Outputs stay the same (bit for bit in float32 on the reference path). Weights that layers share
    stay shared. A model without masked layers is returned unchanged.

    Parametrizations of masked layers are removed: their masked result is the weight.

    `format` says what follows. All but "dense" are for inference; outputs stay equal to rounding,
    and modules stay the same objects, while their Parameters change:

    * "dense": nothing follows, the weights hold zeros.
    * "compact": linear and convolutional layers lose outputs that are constant or that nobody
      reads, and the next layers what read them, where a run with `example_input` proves that only
      functions that keep channels apart lie between.
    * "csr": linear and convolutional layers (1-d, 2-d) that were masked become sparse ones.
    * "auto": compact (with an `example_input`), then sparse where that is faster: on CPUs, in
      layers with few weights left.

    `example_input`: a tensor, a tuple of positional arguments or a dictionary of keyword arguments
    for `model`, which must be in evaluation mode. What a run with it proves holds for the path that
    `forward` takes then. The outputs for it are compared with those before. What became of each
    layer is logged at level INFO.

    Raises TypeError if `model` is no module or returns no tensors, ValueError for an unknown format
    or "compact" without `example_input`, RuntimeError for `example_input` in training mode, for
    sharded weights and for those that a hook computes since conversion; nothing has changed then.
    Raises RuntimeError if the model fails or returns something else for `example_input` at the end;
    it is what format "dense" makes of it then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, but is {format!r}")
    require_module(model)
    if format == "dense":
        return _without_masks(model, bake=True)
    if format == "compact" and example_input is None:
        raise ValueError(
            "format 'compact' needs example_input, an input of the model: a run with it shows "
            "which outputs of layers can be removed"
        )
    example = None if example_input is None else Example(model, example_input)
    sparse = can_be_sparse(model) if format in ("csr", "auto") else []
    _without_masks(model, bake=True)
    lines: list[str] = []
    undo: list[Undo] = []
    try:
        if example is not None and format in ("compact", "auto"):
            compact_(model, example, lines, undo)
        positions = {} if example is None else example.positions
        sparse_(model, sparse, format == "csr", positions, lines, undo)
        avoid_fast_path(model)
        if example is not None:
            example.require_same(model, format)
    except BaseException:
        for each in reversed(undo):
            each()
        restore_fast_path(model)
        raise
    logger.info("finalize_: %s", "; ".join(lines) or "all layers are dense, as they were")
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Turn every masked layer back into the dense layer it was, unmasked; return `model`.

    This undoes `sparsify_`, in place: thresholds are dropped, and pruned weights have their stored
    values again, while `finalize_` sets them to 0. It raises the errors of `finalize_`, and one for
    layers with a parametrization since conversion.
    """
    require_module(model)
    return _without_masks(model, bake=False)


def _without_masks(model: nn.Module, bake: bool) -> nn.Module:
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
