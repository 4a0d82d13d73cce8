"""Changing what a module is, not which module stands there: dense to masked and back.

A module's `__class__` is exchanged, so that its identity, Parameters, hooks, attributes and every
reference to it stay. A module of a class of torch becomes its masked twin. For a user's subclass U
a class is made that inherits from U first and from the twin second: methods of U stay what they
are, and `super().forward` in one of them leads to the twin.
"""

from __future__ import annotations

import types
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops.dtensor import is_dtensor
from .own_forward import members_for_own_forward

if TYPE_CHECKING:
    from ..autograd import MaskOptions
    from .module import MaskedModule


def masked_class(
    dense: type[nn.Module], masked: type[MaskedModule], own: frozenset[str] = frozenset()
) -> type[MaskedModule]:
    """Return the class of a masked `dense`, a subclass of what `masked` replaces.

    `own` names the module's Parameters, buffers and children that hide a convenience of ours.
    """
    if dense is masked.dense_type and not own:
        return masked
    for known in dense.__subclasses__():
        members = known.__dict__
        if members.get("dense_class") is dense and members.get("_own") == own:
            return known
    bases = (masked,) if dense is masked.dense_type else (dense, masked)
    members = {
        "_own": own,
        "__module__": dense.__module__,
        "__qualname__": f"Masked{dense.__qualname__}",
        "__doc__": dense.__doc__,
        "__reduce_ex__": _reduce,
        **members_for_own_forward(dense, masked),
        **{name: property(partial(_own_attribute, name)) for name in own},
    }
    name = f"Masked{dense.__name__}"
    made = types.new_class(name, bases, exec_body=lambda body: body.update(members))
    made.dense_class = dense  # last: one that `__init_subclass__` has refused is never found
    return made


def _own_attribute(name: str, module: nn.Module) -> object:
    return nn.Module.__getattr__(module, name)


def _reduce(self, protocol):
    """Copy and pickle without the class, which no module has by name."""
    twin = next(c for c in type(self).__mro__ if "dense_type" in c.__dict__)
    return _rebuilt, (self.dense_class, twin, self._own), self.__getstate__()


def _rebuilt(*arguments) -> nn.Module:
    return object.__new__(masked_class(*arguments))


def mask_module_(
    module: nn.Module, masked: type[MaskedModule], options: MaskOptions
) -> MaskedModule:
    """Make a dense module a masked one, in place, with thresholds of 0; returns it.

    Raises what the constructor of `masked` does, and then leaves the module as it was.
    """
    dense = type(module)
    owned = {*module._parameters, *module._buffers, *module._modules}
    own = frozenset(name for name in owned if hasattr(masked, name) and not hasattr(dense, name))
    module.__class__ = masked_class(dense, masked, own)
    try:
        module._init_masking(options)
    except Exception:
        module.__class__ = dense
        raise
    return module


def unmask_module_(module: MaskedModule) -> nn.Module:
    """Give a masked module its former class back, in place; thresholds go, weights stay raw.

    Raises RuntimeError where a weight is sharded or computed.
    """
    reason = why_not_unmasked(module)
    if reason is not None:
        raise RuntimeError(reason)
    deferral = module.__dict__.get("_deferral")
    if deferral is not None:
        deferral.release([module])
    for part in module.masked_weights():
        del module._parameters[part.threshold_name]
    for name in ("masking", "_deferral", "_sharded_thresholds"):
        module.__dict__.pop(name, None)
    module.__class__ = module.dense_class
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # which nobody kept up to date meanwhile
    return module


def why_not_unmasked(module: MaskedModule) -> str | None:
    """Return why a module cannot become dense now, with what to do; None where it can."""
    if any(is_dtensor(part.weight) for part in module.masked_weights()):
        return (
            "a sharded layer cannot be made dense: gather the state dict and load it into an "
            "unsharded model first"
        )
    if is_parametrized(module):
        return (
            "a parametrized layer cannot be made dense: call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    if any(part.name not in module._parameters for part in module.masked_weights()):
        return (
            "a layer whose weight is computed cannot be made dense: call "
            "torch.nn.utils.prune.remove (or what else undoes it) on it first"
        )
    return None


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a module of the same class with the same Parameters, attributes and hooks.

    Containers are its own; hooks are shared, so that a handle from before still removes its hook.
    """
    new = object.__new__(type(module))  # FSDP2's classes have a `__new__` that builds
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = module.__dict__[name].copy()
    new.__dict__.pop("_deferral", None)  # which knows the original only
    return new
