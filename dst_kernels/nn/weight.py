"""One masked weight of a module, with its thresholds: what reports and regulariser go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .. import functional as F
from ..ops.dtensor import full_tensor
from .reading import stored_weight

if TYPE_CHECKING:
    from .module import MaskedModule


OUT_IN, TRANSPOSED = "out, in", "in, out"


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """A weight of a masked module and its thresholds.

    Args:
        name, threshold_name: of the module's Parameters.
        matrices: how many lie in the weight, one after the other along its rows; the collapse
            guard sees each of them by itself.
        experts: "" for a weight with one output after the other along dimension 0; OUT_IN or
            TRANSPOSED for matrices [experts, out, in] or [experts, in, out].
    """

    module: MaskedModule
    name: str = "weight"
    threshold_name: str = "threshold"
    matrices: int = 1
    experts: str = ""

    @property
    def weight(self) -> Tensor:
        """The weight as it is stored, or as a parametrization computes it."""
        return stored_weight(self.module, self.name)

    @property
    def threshold(self) -> Tensor:
        return getattr(self.module, self.threshold_name)

    @property
    def frozen(self) -> bool:
        """Whether nothing trains the weight now; then nothing moves its threshold either."""
        if is_parametrized(self.module, self.name):  # computing it may change a buffer
            computed_by = self.module.parametrizations[self.name]
            return not any(parameter.requires_grad for parameter in computed_by.parameters())
        return not self.weight.requires_grad

    def threshold_for(self, weight: Tensor) -> Tensor:
        """The threshold for a forward with this weight: without a gradient if that is frozen."""
        return self.threshold if weight.requires_grad else self.threshold.detach()

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold), output rows first, whole where FSDP2 keeps them sharded."""
        return self.rows(full_tensor(self.weight)), self.rows(full_tensor(self.threshold))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a weight or threshold with one output after the other along dimension 0."""
        if not self.experts:
            return self.module._rows(tensor)
        if tensor.dim() == 3 and self.experts == TRANSPOSED:
            tensor = tensor.transpose(1, 2)
        return tensor.flatten(0, 1) if tensor.dim() > 1 else tensor

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return what `rows` made of a tensor shaped as `like` in that shape again."""
        if not self.experts:
            return self.module._rows(rows)
        if like.dim() == 3 and self.experts == TRANSPOSED:
            experts, columns, outputs = like.shape
            return rows.view(experts, outputs, columns).transpose(1, 2)
        return rows.view(like.shape)

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
        return threshold.repeat_interleave(len(self.rows(self.weight)) // self.matrices)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape, True where a weight is kept; no synchronisation."""
        weight, threshold = self.effective()
        mask = F.threshold_mask(weight, self.each_row(threshold), reset_ratio=None)
        return self.back(mask, self.weight)

    @torch.no_grad()
    def baked(self) -> Tensor:
        """weight * mask, in the weight's layout."""
        weight, threshold = self.effective()
        masked = F.masked_weight(weight, self.each_row(threshold), reset_ratio=None)
        # `_rows` may have lost the layout.
        return torch.empty_like(self.weight).copy_(self.back(masked, self.weight))
