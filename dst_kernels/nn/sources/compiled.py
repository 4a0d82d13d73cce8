"""Let compiled forwards read the W * M that an optimizer's step made.

The compiler asks while it traces a layer. Then W * M is an input of its graph, and whether it is
still fresh is one guard of the whole graph, which runs before every call. While it is stale another
graph runs, which masks in itself; the next step brings it up to date. What the graph has written
into a weight or threshold before the layer reads it counts, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._library import opaque_object

from ...autograd import Packed, pack_weights
from .deferred import Deferral
from .grouped import can_be_grouped

if TYPE_CHECKING:
    from ..layer import MaskedLayer

# torch has renamed both; with a torch that has neither, compiled layers mask by themselves.
_OldBase = getattr(opaque_object, "OpaqueBase", object)
_Base: type = getattr(opaque_object, "CustomClassBase", _OldBase)
_register = getattr(opaque_object, "register_custom_class", None)
_kind = "reference" if _register is None else "symbolic"
_register = _register or getattr(opaque_object, "register_opaque_type", None)

# Bytes of W * M. A C library gives smaller memory that the graph has freed to the gradients that
# come next; without that, they touch new pages, which takes longer than masking.
_LEAST_ON_CPUS = 1 << 25


class Prepared(_Base):
    """Hold, for compiled forwards, the W * M of all layers of a Deferral in one dtype.

    Each layer has its own as `_prepared`: weight, threshold, W * M. It is for training alone.
    """

    def __init__(self, deferral: Deferral, dtype: torch.dtype) -> None:
        self._deferral, self._dtype = deferral, dtype
        self._layers = [
            layer
            for layer in deferral.layers()
            if deferral.serves(layer) and can_be_grouped(layer) and _pays(layer, dtype)
        ]
        self._was_stale = True
        self.renew()

    def __deepcopy__(self, memo: dict) -> Prepared:
        """Return itself: some versions of the compiler would look at a copy."""
        return self

    def is_fresh(self) -> bool:
        """Return whether every W * M is what its layer would make now; if not, take note."""
        for layer in self._layers:
            if _reads(layer) and not self._has(layer):
                self._was_stale = True
                return False
        return True

    def state(self) -> list[object]:
        """Return what compiled forwards are guarded on; not all compilers see what is frozen."""
        frozen = [layer for layer in self._layers if not _reads(layer)]
        return [self.is_fresh(), [*map(id, frozen)]]

    def _has(self, layer: MaskedLayer) -> bool:
        own = layer._prepared
        return own is not None and self._deferral.holds(layer, own[2])

    @torch.no_grad()
    def renew(self) -> None:
        """Make every stale W * M anew, if a compiled forward has missed it."""
        if not self._was_stale:
            return
        self._was_stale = False
        deferral = self._deferral
        for layer in self._layers:
            if not _reads(layer) or self._has(layer) or not deferral.serves(layer):
                continue
            weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
            commits = [layer._commits()]
            made, effective = pack_weights(
                [weight], [threshold], [layer.masking], commits, self._dtype
            )
            masked = deferral.store(layer, made[0], effective[0])
            deferral.fresh([layer])[layer].dense(masked)  # the step is to write all of it
            torch._dynamo.mark_static_address(masked, guard=False)
            layer.__dict__["_prepared"] = weight, threshold, masked

    def release(self, layer: MaskedLayer) -> None:
        """Leave a layer to itself."""
        self._layers = [each for each in self._layers if each is not layer]
        layer.__dict__.pop("_prepared", None)


def _pays(layer: MaskedLayer, dtype: torch.dtype) -> bool:
    """Return whether it takes less time to read what the step made than to mask in the graph."""
    weight = cast(Tensor, layer._parameters["weight"])  # the Deferral serves the layer
    return not weight.is_cpu or weight.numel() * dtype.itemsize >= _LEAST_ON_CPUS


def _reads(layer: MaskedLayer) -> bool:
    """Return whether a forward of the layer reads what a step made."""
    weight = layer._parameters.get("weight")
    return layer.training and weight is not None and weight.requires_grad


if _register is not None:
    _register(
        Prepared,
        typ=_kind,
        guard_fn=Prepared.state,
        members={"is_fresh": opaque_object.MemberType.USE_REAL},
    )


_untouched = [False]  # whether the graph so far has only masked the weight that is looked at


def _look_at_operands(context: Any) -> None:
    """Find out whether the graph may have written into `weight` or `threshold` of the caller.

    Not every write counts up the version of the tensor that the compiler traces with, so no other
    operation than ours may have had one of them.
    """
    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    tracers = [translator.output.current_tracer]
    while tracers[-1].parent is not None:
        tracers.append(tracers[-1].parent)
    operands = [context.get_local(name) for name in ("weight", "threshold")]
    known = [operand.as_proxy() for operand in operands]
    for tracer in reversed(tracers):  # the body of a checkpoint has names of its own for them
        known += [tracer.lifted_freevars[each] for each in known if each in tracer.lifted_freevars]
    others = [
        user
        for each in known
        for user in each.node.users
        if str(user.target) != "autograd_function_apply"
        and not (user.target is getattr and user.args[1] in ("device", "is_cpu"))
    ]
    written = any(operand.as_fake()._version for operand in operands)
    _untouched[0] = not (others or written)


def can_take(layer: MaskedLayer, dtype: torch.dtype) -> bool:
    """Return whether a layer that is being traced may take its W * M as long as that is fresh."""
    deferral = layer._deferral
    if deferral is None or _register is None:
        return False
    if deferral.prepared is None:
        deferral.prepared = Prepared(deferral, dtype)
    own = layer._prepared
    return own is not None and own[2].dtype is dtype and _untouched[0]


def made_by_step(
    layer: MaskedLayer, weight: Tensor, threshold: Tensor, dtype: torch.dtype
) -> Packed | None:
    """Return W * M as the last step made it, for a compiler to trace; None: mask in the graph."""
    from torch._dynamo.comptime import comptime  # nothing imports it without a compiler

    comptime(_look_at_operands)
    if not layer._can_take(dtype):
        return None
    own, deferral = layer._prepared, layer._deferral
    if own is None or own[0] is not weight or own[1] is not threshold:  # others in their place
        return None
    if deferral is None or deferral.prepared is None or not deferral.prepared.is_fresh():
        return None
    return Packed(own[2], threshold)
