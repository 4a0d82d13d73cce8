"""Convert a user's own model in one call, or plan that and say what it would do and why."""

from __future__ import annotations

import logging

from torch import nn

from ..nn import MaskedModule
from ..nn.in_place import let_read_, mask_module_, unmask_module_
from ..nn.parameters import mask_parameters_
from ..nn.reading import Readable
from ._kinds import layouts_of, masked_type
from ._transformer_encoder import avoid_fast_path
from ._weight_readers import is_reader
from .config import SparsifyConfig
from .note import note_masks_
from .planning import ConversionPlan, FilterFn, plan_conversion

logger = logging.getLogger(__name__)


def plan_sparsify(
    model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None
) -> ConversionPlan:
    """Return what `sparsify_` with the same arguments would do, and change nothing.

    Raises what `sparsify_` does.
    """
    return plan_conversion(model, SparsifyConfig() if config is None else config, filter_fn)[0]


def sparsify_(
    model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """Turn linear, convolutional and recurrent layers into masked ones; return `model`.

    In place: every module stays the same object, with its Parameters, hooks, methods and
    attributes, so lists, aliases and closures that hold it stay valid. Its class becomes a subclass
    of the one it has: `isinstance(layer, MaskedLinear)` holds, and so does `isinstance(layer,
    TheUsersClass)`. With thresholds at 0 the outputs stay the same. Weights shared between layers
    stay shared and share their threshold. A second call changes nothing. Convert before building
    the optimizer, `torch.compile`, DDP or `fully_shard`. `finalize_` and `densify_` undo it.

    A weight that is frozen (`requires_grad` is False) before or after this keeps the mask that it
    has: neither loss nor regulariser moves its threshold. Adapters of peft stay dense.

    `config` (default: `SparsifyConfig()`) chooses options and layers. `filter_fn(module, name)` is
    called for each layer that the config would convert; if it returns False, the layer stays dense.
    What happens to each layer is logged; `plan_sparsify` returns the same as an object.

    Raises TypeError for an argument of another type, ValueError for a model that holds a
    DistributedDataParallel or FullyShardedDataParallel.
    """
    config = SparsifyConfig() if config is None else config
    plan, chosen = plan_conversion(model, config, filter_fn)
    thresholds = {
        id(part.stored): part.threshold
        for module in model.modules()
        if isinstance(module, MaskedModule)
        for part in module.masked_weights()
    }
    done: list[MaskedModule] = []
    try:
        for module in chosen:
            layouts = layouts_of(module, config)
            if layouts:
                done.append(mask_parameters_(module, layouts, config.mask_options()))
            else:
                done.append(mask_module_(module, masked_type(module), config.mask_options()))
    except Exception:  # all or nothing
        for module in done:
            unmask_module_(module)
        raise
    for module in done:
        for part in module.masked_weights():
            shared = thresholds.setdefault(id(part.stored), part.threshold)
            setattr(module, part.threshold_name, shared)
    _let_forwards_read_(model)
    avoid_fast_path(model)
    note_masks_(model, config)
    for layer in plan.layers:
        if layer.action == "convert" and layer.reason:
            logger.warning("%s (%s): %s", layer.name or "(root)", layer.type, layer.reason)
        logger.debug("%s %s (%s) %s", layer.action, layer.name, layer.type, layer.reason)
    logger.info("sparsify_: %s", plan.summary())
    if plan.share() < 0.5:
        reasons = {layer.reason for layer in plan.layers if layer.action == "skip"}
        named = "; ".join(sorted(reasons)[:3]) or "there are no weights to mask"
        logger.warning(
            "sparsify_: %.1f %% of all weights are masked (%s)", 100 * plan.share(), named
        )
    return model


def _let_forwards_read_(model: nn.Module) -> None:
    """Let every forward that may read the weights of its submodules read the masked ones."""
    for module in list(model.modules()):
        if is_reader(module):
            reads = [
                (below, part.name)
                for below in module.modules()
                if below is not module and isinstance(below, MaskedModule)
                for part in below.masked_weights()
                if isinstance(getattr(type(below), part.name, None), Readable)
            ]
            if reads:
                let_read_(module, reads)
