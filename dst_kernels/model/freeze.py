"""Fixed masks: training goes on, but no weight is pruned any more and none comes back."""

from __future__ import annotations

from torch import nn

from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight


def freeze_masks_(model: nn.Module) -> nn.Module:
    """Let every masked weight keep the mask that it has now, in training, too; returns `model`.

    In place, at any time. A layer then computes with W where its mask is True and with 0 elsewhere,
    through torch's own operation (the packed path, also with path="fused" or "mixed"). Weights on
    the mask train on. The others have no gradient, and whatever momentum or weight decay do to
    their values, they do not count. Thresholds have no gradient, no part in the regulariser and no
    effect. `group_` leaves such layers out; `DSTSGD` and `DSTAdamW` take their weights as any other
    parameter, also after `unfreeze_masks_`, and drop a gradient of theirs that waits for a step.

    Each mask is a boolean buffer, `fixed_mask` beside `threshold` and `fixed_mask_<name>` beside
    `threshold_<name>`, in the state dict. Loading one with fixed masks fixes those of a model.
    Where one without meets them, their keys are missing; with strict=False they stay. Sharded by
    FSDP2 (before or after this, on all ranks), layers have whole masks on each rank, and keep W * M
    until the backward pass.

    `MaskedWeight.set_fixed_mask` sets any other mask. Masks that are fixed already stay.

    Raises TypeError where `model` is no module, ValueError where it has no masked layers, holds a
    DistributedDataParallel or has an attribute with a buffer's name, and then changes no mask.
    """
    parts = [part for part in _unwrapped_parts(model) if part.fixed_mask is None]
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
    """Let thresholds decide again: each mask is |W| > t, with the t of then; returns `model`.

    Undoes `freeze_masks_`, in place. So a weight that has shrunk to its threshold goes, and a
    pruned one that lies above it comes back. Thresholds that trained before train again. Where no
    mask is fixed, nothing changes.

    Raises TypeError where `model` is no module, ValueError where it has no masked layers or holds a
    DistributedDataParallel.
    """
    for part in _unwrapped_parts(model):
        part.drop_fixed_mask()
    return model


def _unwrapped_parts(model: nn.Module) -> list[MaskedWeight]:
    parts = [part for _, part in named_masked_weights(model)]
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model holds a DistributedDataParallel, which averages the gradients of those "
            "parameters that had some when it was made: give its module, and wrap that anew"
        )
    return parts
