"""Give layers one masked weight: its threshold, the guard's resets, where the weight comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .. import autograd
from .. import functional as F
from .in_place import shallow_copy
from .module import MaskedModule
from .reading import Readable
from .sources import Deferral, attached_weight, can_take, copies_of, known_of, source_of
from .sources.stamp import stamp
from .tools import recorded
from .weight import MaskedWeight


class MaskedLayer(MaskedModule):
    """Mask the `weight` of a `torch.nn` layer, as a mixin before its class; see `MaskedLinear`.

    Attributes:
        threshold: Parameter, float32 (float64 beside a float64 weight) whatever the weight's
            dtype, of shape [rows], [1] or the weight's, by `granularity`.
        masking: the options, which can also be read and set by their own names.
    """

    own_reads = ("weight",)
    weight = Readable("weight")
    _as_stored = True  # whether operations take the weight as it is stored
    _keeps_rows = False  # whether they can take kept weights alone, under a fixed mask
    _taker: Deferral | None = None  # of an optimizer that takes gradients of these alone
    _deferral: Deferral | None = None
    _prepared: tuple[Tensor, Tensor, Tensor] | None = None  # see sources/compiled.py
    _is_replica = False  # DataParallel sets it

    def masked_weights(self) -> tuple[MaskedWeight]:
        """Return the layer's one masked weight, as a tuple."""
        return (MaskedWeight(self),)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Return (weight, threshold), output rows first, unsharded under FSDP2 (on all ranks)."""
        return MaskedWeight(self).gathered()

    def mask(self) -> Tensor:
        """Return a boolean tensor of the weight's shape: True where kept; no synchronisation."""
        return MaskedWeight(self).mask()

    @torch.no_grad()
    def remaining_ratio(self) -> Tensor:
        """Return kept weights / all weights, a 0-dim float32 tensor on the layer's device."""
        if self._fixed:
            return self.mask().sum().to(torch.float32) / self.weight.numel()
        weight, threshold = MaskedWeight(self).gathered()
        return F.remaining_ratio(weight, threshold, reset_ratio=self.masking.reset_ratio)

    # -- for forward ---------------------------------------------------------------------------

    def _can_take(self, dtype: torch.dtype) -> bool:
        """Return `can_take`, which the compiler calls while it traces the layer."""
        return can_take(self, dtype)

    # As torch.compiler.assume_constant_result does, which would import the compiler.
    vars()["_can_take"]._dynamo_marked_constant = True

    def _operands(self) -> tuple[Tensor, Tensor]:
        """Return (weight, threshold) as the layer's operation takes them."""
        weight, threshold = self._parameters.get("weight"), self._parameters.get("threshold")
        if weight is None or threshold is None:  # computed
            weight, threshold = MaskedWeight(self).weight, self.threshold
        if self._as_stored:
            return weight, threshold
        return self._rows(weight), self._rows(threshold)

    def _masked(self, operation: Callable) -> Tensor:
        """Return `operation(weight, threshold, options, source)` of the layer's own tensors.

        In training a reset by the guard is committed (written into the threshold). Autograd saves
        the effective threshold, a tensor of its own, so a commit between a forward and its backward
        (a layer used twice, a second forward) does no harm.
        """
        if self._fixed:
            return self._under_fixed_mask(operation)
        weight, threshold = self._operands()
        if not weight.requires_grad:  # frozen: the mask stays as it is
            threshold = threshold.detach()
        commits = self._commits()
        source = source_of(self, commits)
        result, effective = operation(weight, threshold, self.masking, source)
        if commits:
            if effective is threshold:  # it has been written already
                return result
            if not source.keep or torch.compiler.is_compiling():
                self._commit(threshold, effective)
                return result
            before = None if source.recall is None else stamp(self)
            try:  # `_commit`, without the cost of a context manager
                threshold.detach().copy_(effective)
            except RuntimeError:
                self._commit(threshold, effective)
            if source.recall is not None and (copies := copies_of(self)) is not None:
                copies.threshold_was_committed(before)
        elif (
            source.dense_gradient
            and not torch.compiler.is_compiling()
            and self._deferral is not None
        ):
            self._deferral.forward_commits_nothing(self)
        return result

    def _under_fixed_mask(self, operation: Callable) -> Tensor:
        """Return `operation` of the weight under its fixed mask, on the packed or sparse path."""
        part = MaskedWeight(self)
        weight, threshold, options = part.weight, self.threshold, self.masking
        known = part.known_mask(weight) if self._keeps_rows else None
        source = autograd.MADE
        if known is not None:
            source = known.source
        else:
            weight = part.under_fixed_mask(weight)
            if not self._as_stored:
                weight, threshold = self._rows(weight), self._rows(threshold)
        if options.path not in ("auto", "sparse"):
            options = options._replace(path="packed")
        return operation(weight, threshold, options, source)[0]

    def _slow_forward(self, *args, **kwargs):
        """Compute as a dense layer with W * M; torch calls this where torch.jit.trace records."""
        if torch._C._get_tracing_state() is None:
            return self.forward(*args, **kwargs)
        dense: nn.Module = shallow_copy(self)
        dense.__class__ = self.dense_class
        dense.__dict__.pop("weight", None)  # where pruning has put a computed one
        dense._parameters["weight"] = cast(nn.Parameter, recorded(MaskedWeight(self)))
        return dense._slow_forward(*args, **kwargs)

    def _weight_to_compute_with(self, name: str, weight: Tensor) -> Tensor:
        """Return W * M in the weight's own dtype, for a user's own forward."""
        attached = attached_weight(self, weight)
        if attached is not None and attached.dtype == weight.dtype:
            known = known_of(self, attached)
            return attached if known is None else known.dense(attached)
        return self._rows(
            self._masked(
                lambda weight, threshold, options, source: autograd.masked_weight(
                    weight, threshold, options, weight.dtype, source
                )
            )
        )
