"""Prune by magnitude: set thresholds that keep the share of weights that the user asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import require_number
from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor
from ..reference.weight import largest_collapsed_count

SCOPES = ("global", "layer")


@torch.no_grad()
def prune_(model: nn.Module, ratio: float, *, scope: str = "global") -> nn.Module:
    """Set thresholds so that the largest masked weights remain, a share `ratio`; return `model`.

    In place; the weights do not change, and training continues from these thresholds. All
    thresholds that are set together get the same value, a quantile of |W|, whatever their
    granularity. Weights of equal magnitude at the cut are all kept or all pruned, whichever is
    nearer to `ratio`; a weight of exactly 0 is always pruned. Frozen weights are pruned, too. The
    host waits for the device.

    Args:
        model: a model with masked layers.
        ratio: the share of the weights to keep, above 0, at most 1.
        scope: "global" ranks all masked weights of the model together, "layer" each by itself.

    Raises:
        TypeError: `model` is no module, or `ratio` no number.
        ValueError: `ratio` or `scope` is not one of these; the model has no masked layers; a mask
            is fixed (`freeze_masks_`); or so little of a layer would remain that the collapse guard
            would reset its thresholds.
        RuntimeError: a weight is sharded. In each case nothing has changed.
    """
    require_number("ratio", ratio, positive=True)
    if ratio > 1:
        raise ValueError(f"ratio must be at most 1, but is {ratio}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, but is {scope!r}")
    found = {id(part.threshold): (name, part) for name, part in named_masked_weights(model)}
    named = list(found.values())
    fixed = [name or "the model" for name, part in named if part.fixed_mask is not None]
    if fixed:
        raise ValueError(
            f"model: the mask of {fixed[0]} ({len(fixed)} such) is fixed, whatever its threshold: "
            "call dst_kernels.unfreeze_masks_ before"
        )
    for name, part in named:
        if is_dtensor(part.weight):
            raise RuntimeError(f"{name or 'the model'} is sharded: prune before fully_shard")
    together = [named] if scope == "global" else [[each] for each in named]
    limits = [
        (name, part, limit)
        for group in together
        for limit in [_quantile([part.weight for _, part in group], ratio)]
        for name, part in group
    ]
    collapsed = [name or "the model" for name, part, limit in limits if _collapses(part, limit)]
    if collapsed:
        raise ValueError(
            f"ratio: at {ratio} the collapse guard would restart {', '.join(collapsed)}, of which "
            "no more than reset_ratio would remain: set a lower reset_ratio there (None: no guard)"
            + (", or use scope='layer'" if scope == "global" else "")
        )
    for _, part, limit in limits:
        part.threshold.copy_(_rounded_down(limit, part.threshold.dtype))
    return model


def _quantile(weights: Sequence[Tensor], ratio: float) -> Tensor:
    """Return the largest magnitude to prune, 0-dim, so that the share `ratio` remains."""
    device = weights[0].device
    sizes = torch.cat([weight.abs().flatten().to(device) for weight in weights])
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32)).nan_to_num_(nan=torch.inf)
    gone = sizes.numel() - round(ratio * sizes.numel())
    if gone == 0:
        return sizes.new_zeros(())
    limit = sizes.kthvalue(gone).values
    fewer, more = (sizes < limit).sum(), (sizes <= limit).sum()
    if gone - fewer < more - gone:
        limit = torch.where(sizes < limit, sizes, 0).max()
    return limit


def _collapses(part: MaskedWeight, limit: Tensor) -> bool:
    """Return whether the guard would reset the thresholds of any of a weight's matrices."""
    ratio = part.module.masking.reset_ratio
    if ratio is None or limit <= 0:
        return False
    weight, limit = part.rows(part.weight), limit.to(part.weight.device)
    return any(
        (~(matrix.abs() <= limit)).sum() <= largest_collapsed_count(matrix.numel(), ratio)
        for matrix in weight.chunk(part.matrices)
    )


def _rounded_down(limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `limit` in `dtype`, rounded down, so that no more weights are pruned."""
    rounded = limit.to(dtype)
    below = torch.nextafter(rounded, rounded.new_full((), -torch.inf))
    return torch.where(rounded > limit, below, rounded)
