"""Follow masks from epoch to epoch: what changed, what was ever kept, what the guard restarted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.find import named_masked_weights

_NEARLY_NONE, _JUMP = 0.05, 5  # a layer's ratio, and what only the guard multiplies it with

COLUMNS = ("churn", "ever_active", "dead_rows")
"""What a record of a sparse run has beside its ratios: the share of the masks' bits that differ
from those at the end of the epoch before, the share of the weights that were kept at the end of
some epoch, and the output rows and filters with no weight left."""


def was_restarted(before: float, now: float) -> bool:
    """Return whether the guard has led from one remaining ratio of a layer to the next epoch's.

    It keeps all weights again; until the end of the epoch some of them are pruned once more.
    """
    return before < _NEARLY_NONE and now > _JUMP * before


class Masks:
    """Hold the masks of the last epoch, and of all epochs together.

    `ever` is what `packed` returned, {} before the first epoch. With FSDP2 all processes must call
    this, and `update`.
    """

    def __init__(self, model: nn.Module, ever: dict[str, Tensor]) -> None:
        self.last = _masks(model)
        self.ever = {
            name: _unpacked(ever[name], mask) if ever else torch.zeros_like(mask)
            for name, mask in self.last.items()
        }

    def update(self, model: nn.Module) -> tuple[float, float]:
        """Look at the masks after an epoch; return the first two of COLUMNS."""
        masks, changed, active = _masks(model), 0, 0
        for name, mask in masks.items():
            changed += int((mask ^ self.last[name]).sum())
            active += int(self.ever[name].logical_or_(mask).sum())
        total = sum(mask.numel() for mask in masks.values())
        self.last = masks
        return changed / total, active / total

    def packed(self) -> dict[str, Tensor]:
        """Return which weights were ever kept, eight to a byte, on the CPU."""
        return {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy()))
            for name, mask in self.ever.items()
        }


def _masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: part.mask() for name, part in named_masked_weights(model)}


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    flags = np.unpackbits(bits.numpy(), count=like.numel())
    return torch.from_numpy(flags).bool().view(like.shape).to(like.device)
