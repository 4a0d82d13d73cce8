"""Say what functions of torch do with the channels of a tensor, where that is certain.

Channels are the outputs of a layer. A function is listed here only if it keeps them apart: what it
returns for one channel depends on that channel alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._recording import Call, Value, tensors_in


@dataclasses.dataclass(frozen=True)
class Channels:
    """Where the channels of a group of layers are in a tensor, and which of them are constant.

    Index i of dimension `dim` holds channel `channel[i]`; where `constant[i]` is not NaN, it is the
    value of all entries there, whatever the input of the model is.
    """

    group: Any
    dim: int
    channel: Tensor  # [size of dim], int64, on the CPU
    constant: Tensor  # [size of dim], in the tensor's dtype


def _functions(*names: str) -> set[Callable]:
    spaces = (torch, F, torch.Tensor, torch.special)
    return {getattr(space, name) for name in names for space in spaces if hasattr(space, name)}


ELEMENTWISE = _functions(
    "__rdiv__", "__rmul__", "__rsub__", "abs", "abs_", "add", "add_", "celu", "celu_", "clamp",
    "clamp_", "clone", "contiguous", "detach", "div", "div_", "double", "elu", "elu_", "erf", "exp",
    "float", "gelu", "half", "bfloat16", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "hardtanh_", "leaky_relu", "leaky_relu_", "logsigmoid", "mish", "mul", "mul_", "neg", "neg_",
    "pow", "__pow__", "relu", "relu6", "relu_", "selu", "selu_", "sigmoid", "sigmoid_", "silu",
    "softplus", "softshrink", "softsign", "sqrt", "square", "sub", "sub_", "tanh", "tanh_",
    "tanhshrink", "to", "true_divide",
)  # fmt: skip
_DROPOUT = _functions(
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"
)
_MULTIPLY = _functions("mul", "mul_")
_MOVES = _functions(
    "flatten", "movedim", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze",
    "view",
)  # fmt: skip
_MEAN = _functions("mean")
_POOLS = {
    function: (kind, dims)
    for dims in (1, 2, 3)
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for function in _functions(f"{kind}{dims}d")
}
_POOL_ARGUMENTS = {
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool": (
        "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "divisor_override",
    ),
}  # fmt: skip


def bound(call: Call, *names: str) -> dict[str, Any]:
    """Return the arguments of a call by name; `names` are those of its positional ones."""
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def channels_after(call: Call, known: dict[Value, Channels]) -> Channels | None:
    """Return where the channels are after a function that keeps them apart; None for any other.

    For a function of several tensors the group is that of the first.
    """
    values = list(tensors_in((call.args, call.kwargs), Value))
    inputs = [known.get(value) for value in values]
    stored = any(True for _ in tensors_in((call.args, call.kwargs), Tensor))
    if not isinstance(call.result, Value) or None in inputs or stored or "out" in call.kwargs:
        return None
    if call.function in ELEMENTWISE:
        return _elementwise(call, known, values)
    if len(values) != 1:
        return None
    channels = known[values[0]]
    if call.function in _DROPOUT:
        off = bound(call, "input", "p", "training").get("training", True) is False
        return channels if off else None
    if call.function in _POOLS:
        return _pooled(call, channels, values[0])
    if call.function in _MEAN:
        return _mean(call, channels, values[0])
    return _moved(call, channels, values[0]) if call.function in _MOVES else None


def _elementwise(call: Call, known: dict[Value, Channels], values: list[Value]) -> Channels | None:
    first = known[values[0]]
    for value in values[1:]:
        other = known[value]
        same = other.dim == first.dim and torch.equal(other.channel, first.channel)
        if not same or len(value.shape) != len(values[0].shape):
            return None
    constants = {value: known[value].constant for value in values}
    try:
        constant = call_on(call, {value: c.clone() for value, c in constants.items()})
    except RuntimeError:  # such as a memory format that vectors do not have
        return None
    if constant.shape != first.constant.shape or not constant.is_floating_point():
        return None
    for each in constants.values():
        constant = constant.where(~each.isnan(), torch.nan)
    if call.function in _MULTIPLY:
        for each in constants.values():
            constant = constant.where(each != 0, torch.zeros_like(constant))  # 0 times any number
    return dataclasses.replace(first, constant=constant)


def _pooled(call: Call, channels: Channels, value: Value) -> Channels | None:
    kind, dims = _POOLS[call.function]
    if channels.dim >= len(value.shape) - dims:
        return None
    given = bound(call, *_POOL_ARGUMENTS.get(kind, ("input",)))
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    if kind == "avg_pool" and (padding not in (0, (0,) * dims) or given.get("divisor_override")):
        return _keep_zeros(channels)  # other constants differ at the border
    if kind == "max_pool" and dilation not in (1, (1,) * dims):
        return _keep_zeros(channels)
    return channels


def _keep_zeros(channels: Channels) -> Channels:
    constant = channels.constant
    return dataclasses.replace(channels, constant=constant.where(constant == 0, torch.nan))


def _mean(call: Call, channels: Channels, value: Value) -> Channels | None:
    given = bound(call, "input", "dim", "keepdim")
    dims = given.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple) or not dims or set(given) - {"input", "dim", "keepdim"}:
        return None
    reduced = {dim % len(value.shape) for dim in dims}
    if channels.dim in reduced:
        return None
    below = 0 if given.get("keepdim") else sum(dim < channels.dim for dim in reduced)
    return dataclasses.replace(channels, dim=channels.dim - below)


def _moved(call: Call, channels: Channels, value: Value) -> Channels | None:
    """Move the numbers of the indices, once all and once without channel 0, and see where they go.

    Without a channel, sizes that are written out in the call no longer fit.
    """
    indices = torch.arange(len(channels.channel))
    fewer = indices[channels.channel != 0]
    of_bits = any(True for _ in tensors_in((call.args, call.kwargs), torch.dtype))  # view(dtype)
    if len(fewer) == 0 or of_bits:
        return None
    found = _find(call_on(call, {value: _spread(indices, channels.dim, value.shape)}))
    try:
        without = call_on(call, {value: _spread(fewer, channels.dim, value.shape)})
    except (IndexError, RuntimeError, ValueError):
        return None
    if found is None:
        return None
    dim, order = found
    result: Any = call.result
    expected = order[channels.channel[order] != 0]
    shape = list(result.shape)
    shape[dim] = len(expected)
    if list(without.shape) != shape or not torch.equal(without, _spread(expected, dim, shape)):
        return None
    constant = channels.constant[order.to(channels.constant.device)]
    return Channels(channels.group, dim, channels.channel[order], constant)


def _spread(numbers: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return a tensor that holds numbers[i] at index i of `dim`; its other sizes are `shape`'s."""
    line = [1] * len(shape)
    line[dim] = len(numbers)
    full = list(shape)
    full[dim] = len(numbers)
    return numbers.view(line).expand(full).contiguous()


def _find(moved: Tensor) -> tuple[int, Tensor] | None:
    """Return the one dimension along which a tensor changes, and what it holds there."""
    for dim in range(moved.dim() if moved.numel() else 0):
        line = moved.movedim(dim, -1).reshape(-1, moved.shape[dim])[0]
        if len(line) > 1 and torch.equal(moved, _spread(line, dim, moved.shape)):
            return dim, line
    return None


def call_on(call: Call, tensors: dict[Value, Tensor]) -> Tensor:
    """Call the function with other tensors in the place of its values."""

    def put(tree: object) -> Any:
        if isinstance(tree, Value):
            return tensors[tree]
        if isinstance(tree, tuple):
            return tuple(put(each) for each in tree)
        return tree

    kwargs = {key: put(each) for key, each in call.kwargs.items() if key != "memory_format"}
    with torch.no_grad():
        return call.function(*put(call.args), **kwargs)
