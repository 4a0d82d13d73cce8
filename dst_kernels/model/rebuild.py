"""Describe layers that `finalize_` has exchanged or shrunk, and make them again from a file.

A description has a `class`, one of a fixed list, and the `arguments` of its constructor. The layer
of the original model must agree with it in all but the class and the sizes, which only shrink.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
         "padding_mode")  # fmt: skip
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
}
_SIZES = {"in_features", "out_features", "in_channels", "out_channels", "groups"}
_SPARSE: dict[type[nn.Module], type[nn.Module]] = {}
"""The dense class of each sparse one."""
_CLASSES = {cls.__name__: cls for cls in (*_ARGUMENTS, *_SPARSE)}


def sparse_layers(model: nn.Module) -> dict[str, Any]:
    """Return the model's sparse layers under all of their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if type(module) in _SPARSE}


def described_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the description of every layer that is sparse or was shrunk, by name."""
    named = model.named_modules(remove_duplicate=False)
    return {name: described(module) for name, module in named if type(module) in _SPARSE}


def described(module: nn.Module) -> dict[str, Any]:
    """Return the class of a layer and its constructor's arguments, as JSON has them."""
    cls = type(module)
    values = {name: getattr(module, name) for name in _ARGUMENTS[_SPARSE.get(cls, cls)]}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"class": cls.__name__, "arguments": {**values, "bias": module.bias is not None}}


def rebuilt(
    old: nn.Module, description: Any, weight: Tensor | None, bias: Tensor | None
) -> nn.Module:
    """Return the layer that is described, with this weight and bias, on the device of `old`.

    Raises ValueError if it does not come from a layer like `old`, or the tensors are not its own.
    """
    if not isinstance(description, dict) or description.keys() != {"class", "arguments"}:
        raise ValueError(f"its description is {description!r:.80}")
    name, arguments = description["class"], description["arguments"]
    cls: Any = _CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"its class is {name!r:.80}. Accepted: {', '.join(_CLASSES)}")
    dense: Any = _SPARSE.get(cls, cls)
    if type(old) not in (dense, *(each for each in _SPARSE if _SPARSE[each] is dense)):
        raise ValueError(f"it is a {name} there and a {type(old).__name__} in the model")
    extra = old.state_dict().keys() - {"weight", "bias"}
    if type(old) is dense and extra:
        raise ValueError(f"it has a tensor {min(extra)!r} of its own in the model")
    was = described(old)["arguments"]
    if not isinstance(arguments, dict) or arguments.keys() != was.keys():
        raise ValueError(f"its arguments are {arguments!r:.80}. Accepted: {', '.join(was)}")
    for argument, value in arguments.items():
        before = was[argument]
        if argument in _SIZES:
            if type(value) is not int or not 0 <= value <= before:
                raise ValueError(f"{argument} is {value!r:.80}. Accepted: at most {before}")
        elif not isinstance(value, bool) if argument == "bias" else value != before:
            raise ValueError(f"{argument} is {value!r:.80} there and {before!r} in the model")
    tensor = next(each for each in old.state_dict().values() if each.is_floating_point())
    new = dense(**arguments, device="meta", dtype=tensor.dtype)
    for kind, own, given in (("weight", new.weight, weight), ("bias", new.bias, bias)):
        if _form(own) != _form(given):
            raise ValueError(f"its {kind} is {_form(given)}, by its arguments {_form(own)}")
        if given is not None:
            trains = any(parameter.requires_grad for parameter in old.parameters())
            setattr(new, kind, nn.Parameter(given.to(tensor.device), requires_grad=trains))
    return (new if cls is dense else cls.from_dense(new)).train(old.training)


def become_(old: nn.Module, new: nn.Module) -> None:
    """Make a layer the new one, in place; it keeps its hooks."""
    old.__class__ = type(new)
    old.__dict__.update({k: v for k, v in vars(new).items() if "hook" not in k})


def _form(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
