"""Fix masks: training continues, but no more weights are pruned and none comes back."""

from __future__ import annotations

from torch import nn

from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight


def freeze_masks_(model: nn.Module) -> nn.Module:
    """Fix the current mask of every masked weight, in training, too; return `model`.

    In place, at any time. A layer then computes with W where its mask is True and with 0 elsewhere,
    through torch's own operation (the packed path, also with path="fused" or "mixed"). Weights
    where the mask is True still train. The others have no gradient; momentum or weight decay may
    change their values, but nothing uses them. Thresholds have no gradient, no part in the
    regulariser and no effect. `group_` leaves such layers out; `DSTSGD` and `DSTAdamW` update their
    weights as any other parameter, also after `unfreeze_masks_`, and drop their gradients that wait
    for a step.

    Each mask is a boolean buffer, `fixed_mask` beside `threshold` and `fixed_mask_<name>` beside
    `threshold_<name>`, in the state dict. Loading a state dict with fixed masks fixes those of the
    model. If it lacks masks that the model has fixed, their keys are missing; with strict=False the
    masks stay. Layers that FSDP2 shards (before or after this, on all ranks) have whole masks on
    each rank, and keep W * M until the backward pass.

    `MaskedWeight.set_fixed_mask` sets any other mask. Masks that are fixed already stay.

    Raises TypeError if `model` is no module, ValueError if it has no masked layers, holds a
    DistributedDataParallel or has an attribute with a buffer's name; no mask has changed then.
    """
    parts = [part for part in unwrapped_parts(model) if part.fixed_mask is None]
    masks = [part.mask() for part in parts]
    done = []
    try:
        for part, mask in zip(parts, masks, strict=True):
            part.set_fixed_mask(mask)
            done.append(part)
    except Exception:
        for part in done:
            part.drop_fixed_mask()
        raise
    return model


def unfreeze_masks_(model: nn.Module) -> nn.Module:
    """Undo `freeze_masks_`, in place: each mask is |W| > t again; return `model`.

    So a weight that has shrunk to t or below is pruned, and a pruned one that lies above t comes
    back. Thresholds that trained before train again. If no mask is fixed, nothing changes.

    Raises TypeError if `model` is no module, ValueError if it has no masked layers or holds a
    DistributedDataParallel.
    """
    for part in unwrapped_parts(model):
        part.drop_fixed_mask()
    return model


def unwrapped_parts(model: nn.Module) -> list[MaskedWeight]:
    """Return every masked weight; raise ValueError for what a fixed mask cannot be set in."""
    parts = [part for _, part in named_masked_weights(model)]
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model holds a DistributedDataParallel, which averages the gradients of those "
            "parameters that had some when it was made: give its module, and wrap that anew"
        )
    return parts
