"""Change a dense module into a masked one and back, as the same object.

A module's `__class__` is replaced, so that its identity, Parameters, hooks, attributes and every
reference to it stay. A module of one of torch's classes gets that class's masked twin. For a user's
subclass U a class is made that inherits from U first and from the twin second: methods of U stay,
and `super().forward` in one of them calls the twin's.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops.dtensor import is_dtensor
from .reading import members_for_reading, stored_weight
from .tools import LEAF

if TYPE_CHECKING:
    from ..autograd import MaskOptions
    from .module import MaskedModule


_Module = TypeVar("_Module", bound=nn.Module)
_COMPUTING = ("forward", "_conv_forward", "_output_padding")


def masked_class(
    dense: type[nn.Module],
    masked: type[MaskedModule],
    own: frozenset[str] = frozenset(),
    names: tuple[str, ...] = (),
) -> type[MaskedModule]:
    """Return the masked class for modules of the class `dense`; `masked` is the twin.

    `own`: the module's Parameters, buffers and children that have the name of one of our methods,
    and hide it. `names`: the Parameters that are masked where the module's own forward reads them.
    """
    if dense is masked.dense_type and not own and not names:
        return masked
    if any(getattr(dense, m, None) is not getattr(masked.dense_type, m, None) for m in _COMPUTING):
        names = names or masked.own_reads
    members = {name: property(partial(_own_attribute, name)) for name in own}
    bases = (masked,) if dense is masked.dense_type else (dense, masked)
    return _derived(dense, bases, (masked, own, names), members)


def reading_class(dense: type[nn.Module]) -> type[nn.Module]:
    """Return a class like `dense` whose forward reads the masked weights of its children."""
    return _derived(dense, (dense,), (None, frozenset(), ()), {})


def _derived(dense: type, bases: tuple, made_for: tuple, members: dict[str, Any]) -> Any:
    known: type
    for known in dense.__subclasses__():
        if known.__dict__.get("dense_class") is dense and known.__dict__.get("_for") == made_for:
            return known
    masked, _, names = made_for
    prefix = "" if masked is None else "Masked"
    if masked is None or names:
        members = {**members_for_reading(dense, names), **members}
    members = {
        "_for": made_for,
        "__module__": dense.__module__,
        "__qualname__": prefix + dense.__qualname__,
        "__doc__": dense.__doc__,
        "__reduce_ex__": _reduce,
        **members,
    }
    made: Any = types.new_class(
        prefix + dense.__name__, bases, exec_body=lambda body: body.update(members)
    )
    made.dense_class = dense  # last, so that a class that `__init_subclass__` refuses is not found
    return made


def _own_attribute(name: str, module: nn.Module) -> object:
    return nn.Module.__getattr__(module, name)


def _reduce(self, protocol):
    """Copy and pickle by what the class was made from, since no file defines it by name."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    made_for = next(c.__dict__["_for"] for c in type(self).__mro__ if "_for" in c.__dict__)
    return _rebuilt, (self.dense_class, *made_for), state


def _rebuilt(dense: type, masked: type | None, *rest) -> nn.Module:
    made = reading_class(dense) if masked is None else masked_class(dense, masked, *rest)
    return object.__new__(made)


def mask_module_(
    module: nn.Module,
    masked: type[MaskedModule],
    options: MaskOptions,
    names: tuple[str, ...] = (),
) -> MaskedModule:
    """Make a dense module a masked one, in place, with thresholds of 0; return it.

    Raises what the constructor of `masked` does, and then leaves the module unchanged.
    """
    dense = type(module)
    owned = {*module._parameters, *module._buffers, *module._modules} - {"weight", *names}
    own = frozenset(name for name in owned if hasattr(masked, name) and not hasattr(dense, name))
    module.__class__ = masked_class(dense, masked, own, names)
    changed = cast("MaskedModule", module)
    try:
        changed._init_masking(options)
    except Exception:
        module.__class__ = dense
        raise
    return changed


def unmask_module_(module: MaskedModule) -> nn.Module:
    """Give a masked module its dense class back, in place; drop thresholds, keep weights unmasked.

    Raises RuntimeError if a weight is sharded or computed.
    """
    reason = why_not_unmasked(module)
    if reason is not None:
        raise RuntimeError(reason)
    deferral = module.__dict__.get("_deferral")
    if deferral is not None:
        deferral.release([module])
    for part in module.masked_weights():
        del module._parameters[part.threshold_name]
        module._buffers.pop(part.fixed_mask_name, None)
    for name in (
        "masking", "_deferral", "_known_mask", "_sharded_thresholds", "_fixed", "_taker",
        "_is_read", "_reads", "_layouts", *LEAF,
    ):  # fmt: skip
        module.__dict__.pop(name, None)
    dense = cast(nn.Module, module)
    dense.__class__ = module.dense_class
    if isinstance(dense, nn.RNNBase):
        dense._init_flat_weights()  # masked modules do not keep them up to date
    return dense


def why_not_unmasked(module: MaskedModule, *, baked: bool = False) -> str | None:
    """Return why a module cannot become dense now, and what to do; None if it can.

    If it is to be `baked`, parametrizations are no reason: `drop_parametrizations_` comes before.
    """
    if baked and is_parametrized_since(module):
        return None
    if any(is_dtensor(part.weight) for part in module.masked_weights()):
        return (
            "a sharded layer cannot be made dense: gather the state dict and load it into an "
            "unsharded model first"
        )
    if is_parametrized_since(module):
        return (
            "a parametrized layer cannot be made dense: call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    stored = module._parameters
    if not _was_parametrized(module) and any(p.name not in stored for p in module.masked_weights()):
        return (
            "a layer whose weight is computed cannot be made dense: call "
            "torch.nn.utils.prune.remove (or what else undoes it) on it first"
        )
    return None


def is_parametrized_since(module: MaskedModule) -> bool:
    """Return whether a parametrization computes parameters of a module since it was masked."""
    return is_parametrized(module) and not _was_parametrized(module)


@torch.no_grad()
def drop_parametrizations_(modules: Iterable[nn.Module]) -> None:
    """Store in each module what its parametrizations compute, and remove these.

    A parameter that was given to a parametrization stays the same object, if it has the shape and
    dtype of the result. Not `remove_parametrizations`: it takes the property from the class, which
    copies share.
    """
    computed = [
        (module, name, stored_weight(module, name).clone(), getattr(by, "original", None))
        for module in modules
        for name, by in module.parametrizations.items()  # type: ignore[union-attr, operator]
    ]  # all before the first one is stored: modules may share a parameter
    for module in dict.fromkeys(module for module, *_ in computed):
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
    for module, name, value, original in computed:
        stored = nn.Parameter(value)
        like = value.shape, value.dtype
        if isinstance(original, nn.Parameter) and (original.shape, original.dtype) == like:
            original.copy_(value)
            stored = original
        module.register_parameter(name, stored)


def _was_parametrized(module: MaskedModule) -> bool:
    """Return whether a parametrization computed the weight before the module was masked."""
    names = [part.name for part in module.masked_weights()]
    return any(isinstance(getattr(module.dense_class, name, None), property) for name in names)


def let_read_(module: nn.Module, reads: Sequence[tuple[nn.Module, str]]) -> None:
    """Let the forward of a module read masked weights from these attributes of other modules."""
    if not hasattr(type(module), "_own_reads"):
        module.__class__ = reading_class(type(module))
    module.__dict__["_reads"] = reads
    for read, _ in reads:
        read.__dict__["_is_read"] = True


def stop_reading_(module: nn.Module) -> None:
    """Undo `let_read_`: give the module its former class back."""
    if module.__dict__.pop("_reads", None) is not None:
        module.__class__ = type(module).__dict__["dense_class"]


def shallow_copy(module: _Module) -> _Module:
    """Return a module of the same class with the same Parameters, attributes and hooks.

    It has its own containers, but shares hooks, so that an older handle still removes its hook.
    """
    new = object.__new__(type(module))  # FSDP2's classes have a `__new__` that builds
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = module.__dict__[name].copy()
    for name in ("_deferral", "_prepared", "_taker"):  # the optimizer knows the original only
        new.__dict__.pop(name, None)
    return new
