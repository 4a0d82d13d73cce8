"""Layers with one masked weight: the threshold, the committed guard, what optimizers defer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F
from ..ops.dtensor import is_dtensor, reset_shard
from .module import MaskedModule, MaskedWeight
from .sources.deferral import Deferral
from .sources.reuse import packs_of

__all__ = ["MaskedLayer"]


class MaskedLayer(MaskedModule):
    """Mixin that goes before a `torch.nn` layer with a `weight`; see `MaskedLinear`.

    Attributes:
        threshold: Parameter, float32 (float64 beside a float64 weight) whatever the weight's
            dtype, of shape [rows], [1] or the weight's, by `granularity`.
        granularity, reset_ratio, surrogate, structure_gradient, backend, path: as given.
    """

    _sharded_threshold: Tensor | None = None
    _deferral: Deferral | None = None
    _is_replica = False  # DataParallel sets it
    _attached: object = None  # see sources/group.py

    def masked_weights(self) -> tuple[MaskedWeight]:
        """The one, as modules with several name theirs."""
        return (MaskedWeight(self),)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold), output rows first, whole where FSDP2 keeps them sharded."""
        return MaskedWeight(self).gathered()

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape, True where a weight is kept; no synchronisation."""
        return MaskedWeight(self).mask()

    @torch.no_grad()
    def remaining_ratio(self) -> Tensor:
        """Kept weights / all weights, a 0-dim float32 tensor on the layer's device."""
        weight, threshold = self.gathered()
        return F.remaining_ratio(weight, threshold, reset_ratio=self.reset_ratio)

    # -- for forward ---------------------------------------------------------------------------

    def _operands(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold) as the layer's operation takes them."""
        return self._rows(self.weight), self._rows(self.threshold)

    def _masked(self, operation: Callable, input: Tensor, bias: Tensor | None, *geometry) -> Tensor:
        """The layer's output; in training a reset of the thresholds is committed.

        What autograd saves is the effective threshold, a tensor of its own, so that a commit
        between a forward and its backward (a layer used twice, a second forward) does no harm.
        """
        weight, threshold = self._operands()
        reuse = None
        if not torch.compiler.is_compiling() and self._sharded_threshold is None:
            reuse = packs_of(self)
        output, effective = operation(
            input,
            weight,
            threshold,
            bias,
            *geometry,
            reset_ratio=self.reset_ratio,
            surrogate=self.surrogate,
            structure_gradient=self.structure_gradient,
            backend=self.backend,
            path=self.path,
            recall=None if reuse is None else reuse.get,
            # FSDP2 frees the gathered weight until backward; a copy of it would undo that.
            keep_packed=self._sharded_threshold is None,
            dense_gradient=self.deferral() is not None,
        )
        if self.training and self.reset_ratio is not None:
            with torch.no_grad():
                if self._sharded_threshold is not None:
                    reset_shard(self._sharded_threshold, threshold, effective)
                threshold.copy_(effective)
            if reuse is not None:
                reuse.threshold_was_committed(threshold)
        return output

    def deferral(self) -> Deferral | None:
        """What an optimizer of `dst_kernels.optim` makes this layer's gradients with, if one does.

        A frozen weight has no gradient that could be deferred, so its threshold gets its own.
        """
        deferral = self._deferral
        if deferral is None or not self.weight.requires_grad:
            return None
        return deferral if torch.compiler.is_compiling() or deferral.serves(self) else None

    # -- torch.nn.Module machinery -------------------------------------------------------------

    def __getstate__(self) -> dict:
        """A copy of the layer belongs to no optimizer and to no forward that is under way."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_deferral", "_attached")}

    def __setattr__(self, name: str, value: object) -> None:
        # During forward FSDP2 puts a gathered copy in the parameter's place and drops it after;
        # a committed reset must also reach the shard, which is seen when FSDP2 sets it here.
        if name == "threshold" and isinstance(value, Tensor) and is_dtensor(value):
            self.__dict__["_sharded_threshold"] = value
        super().__setattr__(name, value)

    def to_dense(self):
        layer = super().to_dense()
        for name in ("_deferral", "_attached"):
            layer.__dict__.pop(name, None)
        return layer
