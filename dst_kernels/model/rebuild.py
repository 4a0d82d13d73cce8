"""Describe layers that `finalize_` has exchanged or shrunk, and make them again from a file.

A description has a `class`, one of a fixed list, and the `arguments` of its constructor. The layer
of the original model must agree with it in all but the class and the sizes, which only shrink.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.sparse import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear

_CONV = SparseConv2d.arguments
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: SparseLinear.arguments,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM),
}
_SIZES = {"in_features", "out_features", "in_channels", "out_channels", "groups", "num_features"}
_DENSE: dict[type, type] = {
    sparse: sparse.dense_type for sparse in (SparseLinear, SparseConv1d, SparseConv2d)
}
_CLASSES = {cls.__name__: cls for cls in (*_ARGUMENTS, *_DENSE)}
_SHRUNK = "_shrunk"


def mark_shrunk_(layer: nn.Module) -> None:
    """Note that a layer of a class of torch is smaller than it was in the model's own code."""
    layer.__dict__[_SHRUNK] = True


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the model's sparse layers under all of their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, SparseLayer)}


def described_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the description of every layer that is sparse or was shrunk, by name."""
    return {
        name: described(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer) or _SHRUNK in vars(module)
    }


def described(layer: Any) -> dict[str, Any]:
    """Return the class of a layer and its constructor's arguments, as JSON has them."""
    cls = type(layer)
    values = {name: getattr(layer, name) for name in _ARGUMENTS[_DENSE.get(cls, cls)]}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    if "affine" not in values:
        values["bias"] = layer.bias is not None
    return {"class": cls.__name__, "arguments": values}


def rebuilt(old: nn.Module, description: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the layer that is described, on the device of `old`.

    `tensors` is the state dict of its dense twin. Raises ValueError if it does not come from a
    layer like `old`, or the tensors are not its own.
    """
    if not isinstance(description, dict) or description.keys() != {"class", "arguments"}:
        raise ValueError(f"its description is {description!r:.80}")
    name, arguments = description["class"], description["arguments"]
    cls: Any = _CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"its class is {name!r:.80}. Accepted: {', '.join(_CLASSES)}")
    dense: Any = _DENSE.get(cls, cls)
    if _DENSE.get(type(old), type(old)) is not dense:
        raise ValueError(f"it is a {name} in the file and a {type(old).__name__} in the model")
    was = described(old)["arguments"]
    if not isinstance(arguments, dict) or arguments.keys() != was.keys():
        raise ValueError(f"its arguments are {arguments!r:.80}. Accepted: {', '.join(was)}")
    for argument, value in arguments.items():
        before = was[argument]
        if argument in _SIZES:
            if type(value) is not int or not 0 <= value <= before:
                raise ValueError(f"{argument} is {value!r:.80}. Accepted: at most {before}")
        elif type(value) is not type(before) or (value != before and argument != "bias"):
            raise ValueError(f"{argument} is {value!r:.80} in the file and {before!r} in the model")
    like = next(each for each in old.state_dict().values() if each.is_floating_point())
    new = dense(**arguments, device="meta", dtype=like.dtype)
    own = new.state_dict()
    extra = old.state_dict().keys() - {*own, "bias"}
    if type(old) is dense and extra:
        raise ValueError(f"it has a tensor {min(extra)!r} of its own in the model")
    forms = [{key: _form(tensor) for key, tensor in each.items()} for each in (tensors, own)]
    if forms[0] != forms[1]:
        raise ValueError(f"its tensors are {forms[0]}, by its arguments {forms[1]}")
    trains = any(parameter.requires_grad for parameter in old.parameters())
    given = {key: tensor.to(like.device, copy=True) for key, tensor in tensors.items()}
    new.load_state_dict(given, assign=True)
    if cls is not dense:
        new = cls.from_dense(new)
    elif arguments != was or _SHRUNK in vars(old):
        mark_shrunk_(new)
    return new.requires_grad_(trains).train(old.training)


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
