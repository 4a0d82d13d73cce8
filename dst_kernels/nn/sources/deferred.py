"""Share masked weights between layers and the optimizer of `dst_kernels.optim` that trains them.

The backward of such a layer leaves the dense gradient G = dL/d(W * M) as the weight's gradient, and
none for the threshold. The optimizer's step makes dW and dt from it, and also writes the masked
weight of the next training forward. Every other forward masks again: evaluation must see writes to
weights that PyTorch does not record, and must not write what a training thread reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import functional as F
from ...autograd import FixedMask, MaskedWeightInMemory, pack_weights, with_dense_gradients
from .stamp import memory_of, stamp, stamp_after_writes

if TYPE_CHECKING:
    from ..layer import MaskedLayer
    from .compiled import Prepared


def deferral_of(layer: MaskedLayer) -> Deferral | None:
    """Return the `Deferral` of the optimizer that makes this layer's gradients, if there is one.

    A frozen weight has no gradient that could be deferred.
    """
    deferral = layer._deferral
    weight = layer._parameters.get("weight", layer.__dict__.get("weight"))  # DataParallel's replica
    if deferral is None or weight is None or not weight.requires_grad:
        return None
    return deferral if torch.compiler.is_compiling() or deferral.serves(layer) else None


def alike(layers: Sequence[MaskedLayer]) -> bool:
    """Return whether all have the same options, except backend and path."""
    return len({layer.masking._replace(backend="auto", path="auto") for layer in layers}) == 1


@dataclass(slots=True, eq=False)
class _Made:
    """Hold W * M of a weight, its stamp (None: stale), and the memory of weight and threshold."""

    weight: MaskedWeightInMemory
    stamp: tuple | None
    memory: tuple


class Deferral:
    """Hold the masked weights that each step renews; layers that share a weight share W * M.

    It is for the parameters that the layers have when it is made, not for later replacements.
    `regularizes` says whether the optimizer adds the gradient of the sparse regulariser. From those
    of `receivers` whose masks are fixed it takes gradients of the kept weights alone.
    """

    regularizes = False

    def __init__(
        self, layers: Iterable[MaskedLayer], receivers: Iterable[MaskedLayer] = ()
    ) -> None:
        self.receivers = {id(layer._parameters["weight"]): layer for layer in receivers}
        for layer in self.receivers.values():
            layer._taker = self
        self._layers = {
            layer: (layer._parameters["weight"], layer._parameters["threshold"]) for layer in layers
        }
        tied: dict[int, list[MaskedLayer]] = {}
        for layer, (weight, _) in self._layers.items():
            tied.setdefault(id(weight), []).append(layer)
        self._tied = {layer: each for each in tied.values() if len(each) > 1 for layer in each}
        self._made: dict[int, _Made] = {}  # by id of the weight
        self._uncommitted: set[MaskedLayer] = set()
        self.prepared: Prepared | None = None  # for compiled forwards, once there are any
        for layer in self._layers:
            layer._deferral = self

    def layers(self) -> list[MaskedLayer]:
        """Return the layers whose gradients the optimizer makes."""
        return [*self._layers]

    def serves(self, layer: MaskedLayer) -> bool:
        """Return whether the layer still has its weight and threshold, and tied layers are alike.

        It has not if functional_call or an assignment replaces them, or a parametrization computes
        them. FSDP2 and DataParallel also replace them, but pass gradients on to the originals.
        """
        mine = self._layers.get(layer)
        if mine is None:  # a replica, or a layer that was released and may be dense now
            return getattr(layer, "_is_replica", False)
        if layer._sharded_thresholds:
            return True
        now = layer._parameters
        if now.get("weight") is not mine[0] or now.get("threshold") is not mine[1]:
            return False
        return layer not in self._tied or alike(self._tied[layer])

    def release(self, layers: Iterable[MaskedLayer] | None = None) -> None:
        """Let `layers` (None: all), and those tied to them, compute dW and dt themselves again.

        Gradients then have the weight's dtype again. A G that waits in `.grad` for a step is
        dropped: another optimizer would mistake it for dW.
        """
        if layers is None:
            self._receive_nothing()
        chosen = list(self._layers if layers is None else layers)
        for layer in {tied: None for each in chosen for tied in self._tied.get(each, [each])}:
            if layer not in self._layers:
                continue
            dense = self.serves(layer)
            weight, _ = self._layers.pop(layer)
            self._made.pop(id(weight), None)
            self._uncommitted.discard(layer)
            if self.prepared is not None:
                self.prepared.release(layer)
            if layer._deferral is not self:
                continue
            layer._deferral = None
            if dense:
                weight.grad = None
            if weight.grad_dtype != weight.dtype:
                grad, weight.grad = weight.grad, None
                weight.grad_dtype = weight.dtype
                weight.grad = None if grad is None else grad.to(weight.dtype)

    def _receive_nothing(self) -> None:
        for layer in self.receivers.values():
            if layer.__dict__.get("_taker") is not self:  # it may be dense now
                continue
            layer._taker = None
            _forget_kept(layer)
            weight = layer._parameters.get("weight")
            if weight is not None and weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.to_dense()
        self.receivers = {}

    def takes_kept(self, layer: MaskedLayer, weight: Tensor) -> bool:
        """Return whether the optimizer takes a gradient of this weight's kept elements alone."""
        return self.receivers.get(id(weight)) is layer

    def kept_of(self, weight: Tensor) -> FixedMask | None:
        """Return the fixed mask of a weight whose gradient is of its kept elements alone."""
        grad = weight.grad
        layer = self.receivers.get(id(weight))
        if grad is None or layer is None or grad.layout is not torch.sparse_coo:
            return None
        known: FixedMask | None = layer.__dict__.get("_known_mask")
        mask = layer._buffers.get("fixed_mask")
        if known is None or mask is None or not known.is_of(mask):
            return None
        return known if known.has(grad._indices()) else None

    # -- what a step made, and what it is to renew ----------------------------------------------

    def fresh(self, layers: Iterable[MaskedLayer]) -> dict[MaskedLayer, MaskedWeightInMemory]:
        """Return each W * M whose weight and threshold have not changed since it was made.

        It is in the memory of the device where they are.
        """
        found = {}
        for layer in layers:
            made = self._made.get(id(layer._parameters["weight"]))
            if made is not None and made.stamp is not None and made.stamp == stamp(layer):
                found[layer] = made.weight
        return found

    def holds(self, layer: MaskedLayer, masked: Tensor) -> bool:
        """Return whether all of the layer's fresh W * M is in the tensor `masked`."""
        made = self._made.get(id(layer._parameters.get("weight")))
        return (
            made is not None
            and made.weight.tensor is masked
            and made.weight.rows is None
            and made.stamp is not None
            and made.stamp == stamp(layer)
            and self.serves(layer)
        )

    def store(self, layer: MaskedLayer, masked: Tensor, effective: Tensor) -> Tensor:
        """Keep W * M; return the tensor that holds it: the previous one if that has its layout.

        A captured CUDA graph reads from the tensor that it was captured with.
        """
        weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
        key = id(weight)
        made = self._made.get(key)
        if made is None or _layout(made.weight.tensor) != _layout(masked):
            made = self._made[key] = _Made(MaskedWeightInMemory(masked), None, ())
        made.weight.made_by_forward(masked, weight, effective)
        addresses = weight.data_ptr(), threshold.data_ptr()
        if addresses != tuple(each.data_ptr() for each in made.memory):
            made.memory = memory_of(layer)
        made.stamp = stamp(layer)
        return made.weight.tensor

    def renewed(self, layers: Iterable[MaskedLayer]) -> None:
        """Take note that a step has written each fresh W * M anew, in the memory where it was."""
        for layer in layers:
            made = self._made[id(layer._parameters["weight"])]
            if made.stamp is not None:
                made.stamp = stamp_after_writes(made.stamp, layer)

    def refresh(self) -> None:
        """Mark every W * M as stale, and keep its memory."""
        for made in self._made.values():
            made.stamp, made.memory = None, ()
        for layer in self.receivers.values():
            _forget_kept(layer)

    def in_memory(self, layer: MaskedLayer, masked: Tensor) -> MaskedWeightInMemory | None:
        """Return what is known of a W * M that a group has attached, if it is the last step's."""
        made = self._made.get(id(layer._parameters["weight"]))
        if made is None or made.weight.tensor.data_ptr() != masked.data_ptr():
            return None
        return made.weight

    # -- resets by the guard, which forwards in evaluation mode do not commit --------------------

    def forward_commits_nothing(self, layer: MaskedLayer) -> None:
        """Remember that the next step has to write the guard's reset into the threshold."""
        if layer.masking.reset_ratio is not None:
            self._uncommitted.add(layer)

    def commit(self, layer: MaskedLayer) -> None:
        """Write the guard's reset into the threshold, if the last training forward did not."""
        ratio = layer.masking.reset_ratio
        if ratio is None or (layer.training and layer not in self._uncommitted):
            return
        self._uncommitted.discard(layer)
        fresh = self.fresh([layer])
        weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
        with torch.no_grad():
            threshold.copy_(F.effective_threshold(weight, threshold, reset_ratio=ratio))
        if fresh:  # it was made with the effective threshold
            self._made[id(weight)].stamp = stamp(layer)

    # -- forwards ------------------------------------------------------------------------------

    def masked_weights(
        self,
        layers: Sequence[MaskedLayer],
        weights: Sequence[Tensor],
        thresholds: Sequence[Tensor],
        dtype: torch.dtype,
        parallel: bool,
    ) -> Sequence[Tensor]:
        """Return every W * M of a forward with gradients; use the last step's if it is not stale.

        The gradients of the weights are G, in the weight's dtype. Only if `dtype` is bfloat16 and
        the model is not in DistributedDataParallel (`parallel`), which needs the weight's dtype,
        are they in bfloat16; not in float16, which GradScaler does not unscale.
        """
        fresh = self.fresh([layer for layer in layers if layer.training])
        known = [*map(fresh.get, layers)]
        masked = [None if each is None else each.tensor for each in known]
        stale = [i for i, each in enumerate(masked) if each is None or each.dtype is not dtype]
        if stale:
            training = [layer.training for layer in layers]
            options = [layers[i].masking for i in stale]
            made, effective = pack_weights(
                [weights[i] for i in stale],
                [thresholds[i] for i in stale],
                options,
                [
                    training[i] and each.reset_ratio is not None
                    for i, each in zip(stale, options, strict=True)
                ],
                dtype,
            )
            for i, each, limit in zip(stale, made, effective, strict=True):
                masked[i] = self.store(layers[i], each, limit) if training[i] else each
                if not training[i]:
                    self.forward_commits_nothing(layers[i])
        reduced = dtype is torch.bfloat16 and not parallel
        for weight in weights:
            wanted = dtype if reduced else weight.dtype
            if weight.grad_dtype != wanted and weight.grad is None:
                weight.grad_dtype = wanted
        waited_for = thresholds if parallel else ()
        return with_dense_gradients(masked, weights, waited_for)  # type: ignore[arg-type]


def _forget_kept(layer: MaskedLayer) -> None:
    """Let a layer with a fixed mask read its weight anew."""
    known: FixedMask | None = layer.__dict__.get("_known_mask")
    if known is not None:
        known.forget()


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()
