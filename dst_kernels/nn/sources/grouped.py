"""Mask all layers of a model at once, before its forward.

A hook on the model makes the masked weights of a bucket of layers in one launch and *attaches*
them; the layers then are plain products. What is attached belongs to one forward: one thread and
one grad mode. A layer uses it only if it equals what the layer would have made itself; in all other
cases (another dtype, swapped parameters, a call outside the model's forward, the compiler) the
layer masks its weight itself, with the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ...autograd import MaskOptions, mask_weights, pack_weights, product_dtype
from ...ops import is_exporting, is_watched
from ...ops.autocast import autocast_enabled
from ...reference.conv import torch_reads
from ..tools import refuse_training
from .deferred import Deferral, deferral_of
from .reused import copies_of, open_scopes
from .stamp import tensor_stamp

if TYPE_CHECKING:
    from ..layer import MaskedLayer


@dataclass(slots=True, eq=False)
class _Forward:
    """Hold what is attached for one forward of a model and for recomputing parts in backward."""

    group: Group
    outer: _Forward | None  # that this one runs in
    with_grad: bool
    thread: int
    made: dict[MaskedLayer, tuple[Tensor, tuple]] = field(default_factory=dict)
    called_in_other_mode: set[MaskedLayer] = field(default_factory=set)


class _Running(threading.local):
    forward: _Forward | None = None  # the innermost on this thread


_running = _Running()
_groups: WeakSet[Group] = WeakSet()


def attached_weight(layer: MaskedLayer, input: Tensor) -> Tensor | None:
    """Return W * M as the model's group made it for this call, or None if it made none."""
    if torch.compiler.is_compiling():
        if is_exporting():
            refuse_training(layer)
        return None
    forward, made = _running.forward, None
    while forward is not None and (made := forward.made.get(layer)) is None:
        forward = forward.outer
    if made is not None and forward is not None:
        if torch.is_grad_enabled() is not forward.with_grad:
            forward.called_in_other_mode.add(layer)
            return None
    # Outside a forward: a checkpoint that backward recomputes must save what it saved the first
    # time. One that ran without gradients (the reentrant kind) saved nothing, and runs its own
    # backward.
    elif not _groups or torch._C._current_graph_task_id() == -1:
        return None
    else:
        forward = next((f for g in _groups for f in g.kept() if layer in f.made), None)
        if forward is None or layer in forward.called_in_other_mode:
            return None
        made = forward.made[layer]
    masked, (identity, version, address) = made
    weight: Any = layer._parameters.get("weight")
    # The weight's stamp is enough within a forward, which has its effective threshold by now.
    if (
        id(weight) != identity
        or weight._version != version
        or weight.data_ptr() != address
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    # As product_dtype says, in a fraction of its time where there is nothing to find out.
    dtype = input.dtype
    if dtype is masked.dtype is weight.dtype and not torch._C._is_any_autocast_enabled():
        return masked
    return masked if product_dtype(input, weight) == masked.dtype else None


@dataclass(slots=True)
class _Bucket:
    device: torch.device
    dtype: torch.dtype
    backend: str
    deferral: Deferral | None
    layers: list[MaskedLayer] = field(default_factory=list)
    weights: list[nn.Parameter] = field(default_factory=list)
    thresholds: list[nn.Parameter] = field(default_factory=list)
    options: list[MaskOptions] = field(default_factory=list)
    bytes: int = 0


class Group:
    """Hold the hooks of one model; a copy or pickle of the model has its own."""

    def __init__(self, layers: list[MaskedLayer], bucket_bytes: int) -> None:
        self._layers = layers
        self._bucket_bytes = bucket_bytes
        self.__setstate__({})

    def __getstate__(self) -> dict:
        return {"_layers": self._layers, "_bucket_bytes": self._bucket_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._kept: list[_Forward] = []
        self._plan: tuple[list, list[_Bucket]] = [], []
        _groups.add(self)

    # -- hooks ---------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple) -> None:
        """Mask the layers; the model's forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        with_grad, thread = torch.is_grad_enabled(), threading.get_ident()
        forward = _Forward(self, self._outer(), with_grad, thread)
        if with_grad:
            self._kept = [each for each in self._kept if each.thread != thread]
        _running.forward = forward
        if is_watched():
            return
        for bucket in self._current_buckets():
            masked = self._mask(bucket, forward, module)
            made = zip(masked, map(tensor_stamp, bucket.weights), strict=True)
            forward.made.update(zip(bucket.layers, made, strict=True))

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Detach the masked weights; the model's forward hook."""
        if torch.compiler.is_compiling():
            return
        forward, _running.forward = _running.forward, self._outer()
        if forward is not None and forward.group is self and forward.with_grad and forward.made:
            self._kept = [*self._kept, forward]

    def _outer(self) -> _Forward | None:
        """Return the forward on this thread around one of this group; end one that was cut off."""
        found = forward = _running.forward
        while forward is not None:
            if forward.group is self:
                found = forward.outer
            forward = forward.outer
        return found

    def kept(self) -> list[_Forward]:
        """Return forwards that backward may still recompute in part, this thread's first."""
        thread = threading.get_ident()
        return sorted(self._kept, key=lambda forward: forward.thread != thread)

    # -- masked weights ------------------------------------------------------------------------

    def _mask(self, bucket: _Bucket, forward: _Forward, module: nn.Module) -> Sequence[Tensor]:
        if forward.with_grad and bucket.deferral is not None:
            return bucket.deferral.masked_weights(
                bucket.layers, bucket.weights, bucket.thresholds, bucket.dtype, _is_parallel(module)
            )
        commits = [layer._commits() for layer in bucket.layers]
        thresholds: Sequence[Tensor] = bucket.thresholds
        if not bucket.weights[0].requires_grad:  # nor do the others; the frozen keep theirs
            thresholds = [threshold.detach() for threshold in thresholds]
        arguments = bucket.weights, thresholds, bucket.options, commits, bucket.dtype
        if not forward.with_grad:
            return pack_weights(*arguments)[0]

        def in_backward() -> None:
            # All gradients have arrived: no checkpoint needs these masked weights again.
            for layer in bucket.layers:
                forward.made.pop(layer, None)
            if not forward.made:
                self._kept = [each for each in self._kept if each is not forward]

        return mask_weights(*arguments, in_backward=in_backward)

    # -- buckets -------------------------------------------------------------------------------

    def _current_buckets(self) -> list[_Bucket]:
        """Return the buckets; make new ones if anything has changed that they depend on."""
        signature: list[Any] = []
        for layer in self._layers:
            own = layer._parameters
            weight, threshold = own.get("weight"), own.get("threshold")
            if weight is None or threshold is None:  # a parametrization computes it
                signature.append(None)
                continue
            signature.append((
                id(weight), id(threshold), weight.dtype, weight.device, weight.requires_grad,
                layer.masking, layer._deferral,
            ))  # fmt: skip
        if torch._C._is_any_autocast_enabled():
            signature += map(_autocast, sorted({each[3].type for each in signature if each}))
        if open_scopes:
            signature += map(copies_of, self._layers)
        known, buckets = self._plan
        if signature != known:
            buckets = self._new_buckets()
            self._plan = signature, buckets  # in one assignment, as other threads read it
        return buckets

    def _new_buckets(self) -> list[_Bucket]:
        """Return buckets in layer order, so that the last ones in backward delay no others."""
        done: list[_Bucket] = []
        filling: dict[tuple, _Bucket] = {}
        for layer in self._layers:
            if not can_be_grouped(layer):
                continue
            weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
            deferral = deferral_of(layer)
            wanted = weight.requires_grad  # otherwise no G is needed
            size = weight.numel() * weight.element_size()
            if deferral is None and size > self._bucket_bytes:
                continue
            dtype = product_dtype(weight, weight)  # an input of the weight's own dtype
            kind = weight.device, dtype, layer.masking.backend, deferral
            key = kind, weight.dtype == torch.float64, wanted
            bucket = filling.get(key)
            if bucket is None or bucket.bytes + size > self._bucket_bytes:
                bucket = filling[key] = _Bucket(*kind)
                done.append(bucket)
            bucket.layers.append(layer)
            bucket.weights.append(weight)
            bucket.thresholds.append(threshold)
            bucket.options.append(layer.masking)
            bucket.bytes += size
        return done


def can_be_grouped(layer: MaskedLayer) -> bool:
    """Return whether torch can multiply by a W * M of the layer that was made before."""
    weight, threshold = map(layer._parameters.get, ("weight", "threshold"))
    return (
        type(weight) is nn.Parameter is type(threshold)
        and weight.device == threshold.device
        and not weight.is_meta
        and weight.numel() > 0
        and (weight.dim() < 4 or torch_reads(weight))
        and layer.masking.path != "fused"
        and layer.rows_first
        and not layer._sharded_thresholds
        and not layer._fixed
        and copies_of(layer) is None
    )


def plan_again() -> None:
    """Let every group choose its layers again at its next forward."""
    for group in _groups:
        group._plan = [], []


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if autocast_enabled(device_type) else None


def _is_parallel(module: nn.Module) -> bool:
    """Return whether this forward is one of DistributedDataParallel."""
    ddp = nn.parallel.DistributedDataParallel
    return isinstance(module, ddp) or ddp._active_ddp_module is not None
