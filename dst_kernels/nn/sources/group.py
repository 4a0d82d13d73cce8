"""Masking all layers of a model at once, before its forward.

A hook on the model makes the masked weights of a bucket of layers in one launch and *attaches*
them; the layers then are plain products. A layer takes what is attached only where it is what it
would have made itself; in all other cases (another dtype, swapped parameters, a call outside the
model's forward, the compiler) it goes on by itself, with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ... import autograd
from ...ops.autocast import autocast_enabled
from ..find import masked_layers
from ..layer import MaskedLayer
from .deferral import Deferral
from .reuse import packs_of

__all__ = ["Group", "attached_weight", "group_", "ungroup_"]


def group_(model: nn.Module, bucket_mb: float = 25) -> nn.Module:
    """Mask the layers of `model` together: one launch for many, in forward and in backward.

    Before each forward of `model`, the masked weights of all its layers are made in one launch
    per bucket; in backward one launch makes the gradients of all weights and thresholds of a
    bucket, once the last of its layers is done. Their values are those of layer by layer, to the
    bit, except that a layer used twice adds up its two gradients before they pass the mask. The
    gradients of biases are those of torch's own layers, which under autocast are sums in the dtype
    of the product. It pays where launches are what costs: small and middle-sized layers.

    Layers with more than `bucket_mb` MB of weights, layers with path="fused" and those that FSDP2
    shards go on one by one, as do all inside compiled code; recurrent modules are groups of their
    own. Each bucket's gradients arrive together, so buckets like those of DistributedDataParallel
    (25 MB) keep its overlap.

    In place; returns `model`. Calling it again changes `bucket_mb`; `ungroup_` undoes it. Works
    on the module that is called in training: `model(input)` must run the hooks of `model`.

    Raises ValueError for a model without masked layers and for `bucket_mb` that is not positive.
    """
    if not bucket_mb > 0:
        raise ValueError(f"bucket_mb must be positive, but is {bucket_mb!r}")
    layers = masked_layers(model)
    ungroup_(model)
    group = Group(layers, int(bucket_mb * 2**20))
    model.register_forward_pre_hook(group.before)
    model.register_forward_hook(group.after, always_call=True)
    return model


def ungroup_(model: nn.Module) -> nn.Module:
    """Undo `group_`, in place; returns `model`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(_owner(hook), Group)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    return model


def is_grouped(model: nn.Module) -> bool:
    return any(isinstance(_owner(hook), Group) for hook in model._forward_pre_hooks.values())


def _owner(hook: object) -> object:
    return getattr(hook, "__self__", None)


@dataclass(slots=True, eq=False)
class _Attached:
    """A layer's masked weight for one forward of the model, and for recomputing it in backward."""

    masked: Tensor
    weight: Tensor
    version: int
    address: int  # an assignment to .data leaves the version as it is
    group: Group
    used_without_grad: bool = False


def attached_weight(layer: MaskedLayer, input: Tensor) -> Tensor | None:
    """W * M as the model's group made it for this call; None where the layer is on its own."""
    if torch.compiler.is_compiling():
        return None
    made: _Attached | None = layer._attached
    if made is None or torch._C._are_functorch_transforms_active():
        return None
    weight = layer._parameters.get("weight")
    if weight is not made.weight or weight._version != made.version:
        return None
    if weight.data_ptr() != made.address:
        return None
    if autograd.product_dtype(input, weight) != made.masked.dtype:
        return None
    if made.group.active:
        if not torch.is_grad_enabled():
            made.used_without_grad = True
    # Outside the model's forward: a checkpoint that is recomputed in backward must save what it
    # saved the first time. One that ran without gradients (the reentrant kind) saved nothing, and
    # runs a backward of its own.
    elif torch._C._current_graph_task_id() == -1 or made.used_without_grad:
        return None
    return made.masked


@dataclass(slots=True)
class _Bucket:
    device: torch.device
    dtype: torch.dtype
    backend: str
    deferral: Deferral | None
    layers: list[MaskedLayer] = field(default_factory=list)
    bytes: int = 0


class Group:
    """The hooks of one model. Copied or pickled with the model, it serves the copy."""

    def __init__(self, layers: list[MaskedLayer], bucket_bytes: int) -> None:
        self._layers = layers
        self._bucket_bytes = bucket_bytes
        self.__setstate__({})

    def __getstate__(self) -> dict:
        return {"_layers": self._layers, "_bucket_bytes": self._bucket_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.active = False
        self._made: list[MaskedLayer] = []
        self._signature: list | None = None
        self._buckets: list[_Bucket] = []

    # -- hooks ---------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        self._detach()
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return
        for bucket in self._current_buckets():
            layers = bucket.layers
            weights = [layer._parameters["weight"] for layer in layers]
            thresholds = [layer._parameters["threshold"] for layer in layers]
            if bucket.deferral is None:
                masked = self._mask(bucket, layers, weights, thresholds)
            else:
                masked = _deferred(bucket, layers, weights, thresholds, _is_parallel(module))
            for layer, weight, each in zip(layers, weights, masked, strict=True):
                # Modules take long to set an attribute, as it might be a parameter.
                made = _Attached(each, weight, weight._version, weight.data_ptr(), self)
                layer.__dict__["_attached"] = made
            self._made += layers
        self.active = True

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling():
            self.active = False
            if not torch.is_grad_enabled():
                self._detach()

    def _detach(self) -> None:
        for layer in self._made:
            if layer._attached is not None and layer._attached.group is self:
                layer.__dict__["_attached"] = None
        self._made = []

    def _in_backward(self) -> None:
        """Once backward is through, no checkpoint will ask for the masked weights again."""
        if self._made:
            torch.autograd.Variable._execution_engine.queue_callback(self._detach)

    # -- masked weights ------------------------------------------------------------------------

    def _mask(
        self,
        bucket: _Bucket,
        layers: list[MaskedLayer],
        weights: list[Tensor],
        thresholds: list[Tensor],
    ) -> list[Tensor]:
        reset_ratios = [layer.reset_ratio for layer in layers]
        if not torch.is_grad_enabled():
            arguments = weights, thresholds, reset_ratios, _commits(layers)
            return autograd.pack_weights(*arguments, bucket.dtype, bucket.backend)[0]
        return autograd.mask_weights(
            weights,
            thresholds,
            reset_ratios,
            _commits(layers),
            bucket.dtype,
            [layer.surrogate for layer in layers],
            [layer.structure_gradient for layer in layers],
            bucket.backend,
            self._in_backward,
        )

    # -- buckets -------------------------------------------------------------------------------

    def _current_buckets(self) -> list[_Bucket]:
        """Made anew where anything has changed that they depend on."""
        signature = [_autocast("cpu"), _autocast("cuda")]
        for layer in self._layers:
            weight, threshold = map(layer._parameters.get, ("weight", "threshold"))
            if weight is None or threshold is None:  # a parametrization computes it
                signature.append(None)
                continue
            signature += (
                id(weight), id(threshold), weight.dtype, weight.device, weight.requires_grad,
                threshold.requires_grad, layer.path, layer.backend, layer._deferral,
                packs_of(layer),
            )  # fmt: skip
        if signature != self._signature:
            self._buckets = self._new_buckets()
            self._signature = signature
        return self._buckets

    def _new_buckets(self) -> list[_Bucket]:
        """In the order of the layers, so that those done last in backward do not delay others."""
        done: list[_Bucket] = []
        filling: dict[tuple, _Bucket] = {}
        for layer in self._layers:
            if not _can_be_grouped(layer):
                continue
            weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
            deferral = layer.deferral()
            wanted = weight.requires_grad or threshold.requires_grad  # else nobody asks for G
            size = weight.numel() * weight.element_size()
            if deferral is None and size > self._bucket_bytes:
                continue
            dtype = autograd.product_dtype(weight, weight)  # an input of the weight's own dtype
            kind = weight.device, dtype, layer.backend, deferral
            key = kind, weight.dtype == torch.float64, wanted
            bucket = filling.get(key)
            if bucket is None or bucket.bytes + size > self._bucket_bytes:
                bucket = filling[key] = _Bucket(*kind)
                done.append(bucket)
            bucket.layers.append(layer)
            bucket.bytes += size
        return done


def _can_be_grouped(layer: MaskedLayer) -> bool:
    weight, threshold = map(layer._parameters.get, ("weight", "threshold"))
    return (
        type(weight) is nn.Parameter is type(threshold)
        and weight.device == threshold.device
        and weight.device.type in ("cpu", "cuda")
        and weight.numel() > 0
        and layer.path != "fused"
        and layer._sharded_threshold is None
        and type(layer)._rows is MaskedLayer._rows
        and packs_of(layer) is None
    )


def _commits(layers: list[MaskedLayer]) -> list[bool]:
    return [layer.training and layer.reset_ratio is not None for layer in layers]


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if autocast_enabled(device_type) else None


def _is_parallel(module: nn.Module) -> bool:
    """Whether this forward is one of DistributedDataParallel."""
    ddp = nn.parallel.DistributedDataParallel
    return isinstance(module, ddp) or ddp._active_ddp_module is not None


def _deferred(
    bucket: _Bucket,
    layers: list[MaskedLayer],
    weights: list[Tensor],
    thresholds: list[Tensor],
    parallel: bool,
) -> list[Tensor]:
    """What the optimizer's last step left; made here where it left nothing or it is out of date."""
    deferral = bucket.deferral
    masked = [deferral.fresh(layer) for layer in layers]
    stale = [
        i for i, each in enumerate(masked)
        if each is None or each.dtype != bucket.dtype or each.device != bucket.device
    ]  # fmt: skip
    if stale:
        commits = _commits(layers)
        made, _ = autograd.pack_weights(
            *([these[i] for i in stale] for these in (weights, thresholds)),
            [layers[i].reset_ratio for i in stale],
            [commits[i] for i in stale],
            bucket.dtype,
            bucket.backend,
        )
        for i, each in zip(stale, made, strict=True):
            if not each.is_inference():  # those could not be saved for a backward
                each = deferral.store(layers[i], each, commits[i])
            masked[i] = each
    if not torch.is_grad_enabled():
        return masked
    # DistributedDataParallel wants the weight's dtype, and GradScaler unscales no float16.
    small = bucket.dtype == torch.bfloat16 and not parallel
    for weight in weights:
        dtype = bucket.dtype if small else weight.dtype
        if weight.grad_dtype != dtype and weight.grad is None:
            weight.grad_dtype = dtype
    return autograd.with_dense_gradients(masked, weights, thresholds)
