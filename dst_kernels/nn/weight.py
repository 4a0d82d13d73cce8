"""One masked weight of a module, with its thresholds: what reports and regulariser go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional as F
from ..ops.dtensor import full_tensor

if TYPE_CHECKING:
    from .module import MaskedModule


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """A weight of a masked module and its thresholds.

    Args:
        name, threshold_name: of the module's Parameters.
        matrices: how many lie in the weight, one after the other along its rows; the collapse
            guard sees each of them by itself.
    """

    module: MaskedModule
    name: str = "weight"
    threshold_name: str = "threshold"
    matrices: int = 1

    @property
    def weight(self) -> Tensor:
        """The weight as it is stored, or as a parametrization computes it."""
        module = self.module
        stored = module._parameters.get(self.name, module.__dict__.get(self.name))
        return getattr(self.module, self.name) if stored is None else stored

    @property
    def threshold(self) -> Tensor:
        return getattr(self.module, self.threshold_name)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold), output rows first, whole where FSDP2 keeps them sharded."""
        rows = self.module._rows
        return rows(full_tensor(self.weight)), rows(full_tensor(self.threshold))

    def effective(self) -> tuple[Tensor, Tensor]:
        """As `gathered`, with the effective threshold."""
        weight, threshold = self.gathered()
        ratio = self.module.masking.reset_ratio
        if self.matrices == 1:
            return weight, F.effective_threshold(weight, threshold, reset_ratio=ratio)
        pairs = zip(weight.chunk(self.matrices), threshold.chunk(self.matrices), strict=True)
        found = [F.effective_threshold(*pair, reset_ratio=ratio) for pair in pairs]
        return weight, torch.cat(found)

    def each_row(self, threshold: Tensor) -> Tensor:
        """A threshold for each row where there is one for each matrix, else as it is."""
        if self.matrices == 1 or threshold.numel() != self.matrices:
            return threshold
        return threshold.repeat_interleave(self.weight.shape[0] // self.matrices)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape, True where a weight is kept; no synchronisation."""
        weight, threshold = self.effective()
        mask = F.threshold_mask(weight, self.each_row(threshold), reset_ratio=None)
        return self.module._rows(mask)

    @torch.no_grad()
    def baked(self) -> Tensor:
        """weight * mask, in the weight's layout."""
        weight, threshold = self.effective()
        masked = F.masked_weight(weight, self.each_row(threshold), reset_ratio=None)
        # `_rows` may have lost the layout.
        return torch.empty_like(self.weight).copy_(self.module._rows(masked))
