"""Describe one masked weight of a module with its thresholds, for reports and the regulariser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .. import functional as F
from ..arguments import require, require_flag, require_tensors
from ..autograd import FixedMask, fixed_weight, may_keep_rows
from ..ops.dtensor import full_tensor, is_dtensor
from .reading import stored_weight
from .sources.grouped import plan_again

if TYPE_CHECKING:
    from .module import MaskedModule


OUT_IN, TRANSPOSED = "out, in", "in, out"


def is_of_mask(key: str, kinds: str | tuple[str, ...] = ("threshold", "fixed_mask")) -> bool:
    """Return whether a name in a state dict is that of a threshold or of a fixed mask."""
    return key.rpartition(".")[2].startswith(kinds)


class Fixed(NamedTuple):
    """Hold a fixed mask's kind of gradient, and whether the threshold trained before."""

    dense_gradient: bool
    threshold_trained: bool


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """Describe a weight of a masked module and its thresholds.

    Args:
        module: the masked module that owns them.
        name, threshold_name: the names of its two Parameters.
        matrices: how many matrices are stacked along the weight's rows; the collapse guard checks
            each of them by itself.
        experts: "" if dimension 0 of the weight is the output; OUT_IN or TRANSPOSED for matrices
            [experts, out, in] or [experts, in, out].
    """

    module: MaskedModule
    name: str = "weight"
    threshold_name: str = "threshold"
    matrices: int = 1
    experts: str = ""

    @property
    def weight(self) -> Tensor:
        """Return the weight as it is stored, or as a parametrization computes it."""
        return stored_weight(self.module, self.name)

    @property
    def stored(self) -> object:
        """Return the parameter that holds the weight, or the parametrization that computes it.

        Weights that modules share have the same one. (A computed weight is a new tensor each time.)
        """
        if is_parametrized(self.module, self.name):
            computed_by = self.module.parametrizations[self.name]
            return getattr(computed_by, "original", computed_by)
        return self.weight

    @property
    def threshold(self) -> Tensor:
        return getattr(self.module, self.threshold_name)

    @property
    def frozen(self) -> bool:
        """Return whether nothing trains the threshold: the mask is fixed, or the weight frozen."""
        if self.name in self.module._fixed:
            return True
        if is_parametrized(self.module, self.name):  # computing it may change a buffer
            computed_by = self.module.parametrizations[self.name]
            return not any(parameter.requires_grad for parameter in computed_by.parameters())
        return not self.weight.requires_grad

    def threshold_for(self, weight: Tensor) -> Tensor:
        """Return the threshold for a forward with `weight`, detached if that needs no gradient."""
        return self.threshold if weight.requires_grad else self.threshold.detach()

    # -- fixed masks ---------------------------------------------------------------------------

    @property
    def fixed_mask_name(self) -> str:
        """Return the name that the fixed mask has among the module's buffers."""
        return self.threshold_name.replace("threshold", "fixed_mask", 1)

    @property
    def fixed_mask(self) -> Tensor | None:
        """Return the mask that was fixed, in the weight's shape; None where thresholds decide."""
        fixed = self.name in self.module._fixed
        return self.module._buffers[self.fixed_mask_name] if fixed else None

    @torch.no_grad()
    def set_fixed_mask(self, mask: Tensor, dense_gradient: bool = False) -> None:
        """Compute with `mask` from now on, whatever the threshold, which no longer trains.

        The layer uses the weight where the mask is True and 0 elsewhere, on the packed path or, on
        CPUs, the sparse one, where layers also make gradients of the kept weights alone. The
        mask is copied into a buffer, `fixed_mask` for `threshold` (and so on), which is part of the
        state dict. Call it again to replace mask and `dense_gradient`: the buffer stays the same
        tensor. An optimizer of `dst_kernels.optim` then updates the weight as any other parameter,
        or where it is kept (see `DSTSGD`); a dense gradient G that waits in its `.grad` for a step
        is dropped. Layers that share a weight share its threshold: fix the mask of each.

        Args:
            mask: boolean, of the weight's shape and on its device, True where a weight is kept.
            dense_gradient: whether the weight's gradient is the dense one, dL/d(weight * mask), so
                that a method can choose weights to grow; else it is 0 where the mask is False.

        Raises:
            TypeError: `mask` is no dense boolean tensor, `dense_gradient` no bool.
            ValueError: another shape or device, or an attribute of the module has the buffer's
                name. In each case nothing has changed.
        """
        require_tensors(mask=mask)
        require(mask.dtype is torch.bool, "mask", "a boolean tensor", mask.dtype)
        require_flag("dense_gradient", dense_gradient)
        module, weight, name = self.module, self.weight, self.fixed_mask_name
        if mask.shape != weight.shape:
            shapes = f"{list(weight.shape)}, but has {list(mask.shape)}"
            raise ValueError(f"mask must have the shape of {self.name}, {shapes}")
        if mask.device != weight.device:
            raise ValueError(
                f"mask must be where {self.name} is, on {weight.device}, but is on {mask.device}"
            )
        known = module._fixed.get(self.name)
        if known is None:
            if hasattr(module, name):
                raise ValueError(
                    f"module ({type(module).__name__}) has an attribute {name!r} of its own, "
                    "a name that its fixed mask needs"
                )
            with torch.inference_mode(False):  # it will be saved for backward
                like = full_tensor(mask) if is_dtensor(weight) else weight
                module.register_buffer(name, torch.empty_like(like, dtype=torch.bool))
            if (deferral := module.__dict__.get("_deferral")) is not None:
                deferral.release([module])
        module._buffers[name].copy_(full_tensor(mask))
        threshold = self.threshold
        trained = known.threshold_trained if known is not None else threshold.requires_grad
        if threshold.is_leaf:  # DistributedDataParallel waits for all that want a gradient
            threshold.requires_grad_(False).grad = None
        module.__dict__["_fixed"] = {**module._fixed, self.name: Fixed(dense_gradient, trained)}
        plan_again()

    def drop_fixed_mask(self) -> None:
        """Undo `set_fixed_mask`: the mask is |weight| > threshold again, and the threshold trains.

        Does nothing where the mask is not fixed.
        """
        fixed = dict(self.module._fixed)
        if self.name not in fixed:
            return
        trained = fixed.pop(self.name).threshold_trained
        self.module.__dict__["_fixed"] = fixed
        del self.module._buffers[self.fixed_mask_name]
        self.module.__dict__.pop("_known_mask", None)
        if trained and self.threshold.is_leaf:
            self.threshold.requires_grad_(True)
        plan_again()

    def under_fixed_mask(self, weight: Tensor) -> Tensor:
        """Return the weight of a forward under its fixed mask."""
        mask = self.module._buffers[self.fixed_mask_name]
        return fixed_weight(weight, mask, self.module._fixed[self.name].dense_gradient)

    def known_mask(self, weight: Tensor) -> FixedMask | None:
        """Return where the fixed mask keeps weights, if a forward with `weight` may want that."""
        module, fixed = self.module, self.module._fixed[self.name]
        mask, options = module._buffers[self.fixed_mask_name], module.masking
        if fixed.dense_gradient or not may_keep_rows(weight, mask, options):
            return None
        known: FixedMask | None = module.__dict__.get("_known_mask")
        if known is None or not known.is_of(mask):
            known = module.__dict__["_known_mask"] = FixedMask(mask, options.backend)
        if not (module.training and torch.is_grad_enabled()):
            known.forget()  # evaluation sees writes that PyTorch does not record
        taker = module._taker
        takes = taker is not None and taker.takes_kept(module, weight)
        known.receiver = weight if takes else None
        return known

    # -- thresholds and masks ------------------------------------------------------------------

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Return (weight, threshold), output rows first, unsharded under FSDP2 (on all ranks)."""
        return self.rows(full_tensor(self.weight)), self.rows(full_tensor(self.threshold))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a weight or threshold with the outputs along dimension 0."""
        if not self.experts:
            return self.module._rows(tensor)
        if tensor.dim() == 3 and self.experts == TRANSPOSED:
            tensor = tensor.transpose(1, 2)
        return tensor.flatten(0, 1) if tensor.dim() > 1 else tensor

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo `rows`: return the tensor in the shape of `like`."""
        if not self.experts:
            return self.module._rows(rows)
        if like.dim() == 3 and self.experts == TRANSPOSED:
            experts, columns, outputs = like.shape
            return rows.view(experts, outputs, columns).transpose(1, 2)
        return rows.view(like.shape)

    def effective(self) -> tuple[Tensor, Tensor]:
        """Return (weight, effective threshold), as `gathered` does."""
        weight, threshold = self.gathered()
        ratio = self.module.masking.reset_ratio
        if self.matrices == 1:
            return weight, F.effective_threshold(weight, threshold, reset_ratio=ratio)
        pairs = zip(weight.chunk(self.matrices), threshold.chunk(self.matrices), strict=True)
        found = [F.effective_threshold(*pair, reset_ratio=ratio) for pair in pairs]
        return weight, torch.cat(found)

    def each_row(self, threshold: Tensor) -> Tensor:
        """Return one threshold for each row, if there is one for each matrix; else `threshold`."""
        if self.matrices == 1 or threshold.numel() != self.matrices:
            return threshold
        return threshold.repeat_interleave(len(self.rows(self.weight)) // self.matrices)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return a boolean tensor of the weight's shape: True where kept; no synchronisation."""
        fixed = self.fixed_mask
        if fixed is not None:
            return fixed.clone()
        weight, threshold = self.effective()
        mask = F.threshold_mask(weight, self.each_row(threshold), reset_ratio=None)
        return self.back(mask, self.weight)

    @torch.no_grad()
    def baked(self) -> Tensor:
        """Return weight * mask, in the weight's layout."""
        if self.fixed_mask is not None:
            return self.under_fixed_mask(self.weight)
        weight, threshold = self.effective()
        masked = F.masked_weight(weight, self.each_row(threshold), reset_ratio=None)
        # `_rows` may have lost the layout.
        return torch.empty_like(self.weight).copy_(self.back(masked, self.weight))
