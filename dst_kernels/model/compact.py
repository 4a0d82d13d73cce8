"""Make layers smaller whose outputs are constant or unread, where a recorded run proves it.

An output of a layer whose weights are all zero is constant: its bias. If only functions that keep
channels apart follow, the constant is moved into the bias of the layers that read it, and the
output goes, together with the weights that read it. Outputs that nobody reads go, too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference.wide import wide_dtype
from ._channels import Channels, bound, call_on, channels_after
from ._example import Example
from ._recording import Call, Recording, Value, record, tensors_in
from .rebuild import mark_shrunk_

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_PRODUCT_TENSORS = ("weight", "bias")
_PRODUCT_ARGUMENTS = ("input", *_PRODUCT_TENSORS, "stride", "padding", "dilation", "groups")
_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")
_NORM_ARGUMENTS = ("input", *_NORM_TENSORS, "training")

Undo = Callable[[], object]


def compact_(model: nn.Module, example: Example, lines: list[str], undo: list[Undo]) -> None:
    """Make layers smaller, in place; add a line on each, and what undoes it (last one first).

    The example is run once. Layers are of torch's exact classes: nn.Linear, nn.Conv1d
    to nn.Conv3d, nn.BatchNorm1d to nn.BatchNorm3d. They get new Parameters of the new shapes.
    """
    network = _Network(model, record(model, example.run, (nn.Linear, *_CONVS, *_NORMS)))
    network.find_unread()
    network.shrink_(lines, undo)


class _Group:
    """Layers whose outputs must stay as many, since they are added, multiplied or normalised."""

    def __init__(self, width: int) -> None:
        self.readers: list[tuple[_Product, Tensor]] = []  # which channel each input has
        self.keep = torch.ones(width, dtype=torch.bool)
        self.fixed = False  # something may read its channels that is not understood
        self._same: _Group | None = None

    def root(self) -> _Group:
        return self if self._same is None else self._same.root()

    def join(self, other: _Group) -> None:
        mine, its = self.root(), other.root()
        if mine is not its:
            its._same = mine
            mine.readers += its.readers
            mine.fixed |= its.fixed


@dataclasses.dataclass(eq=False)
class _Product:
    """A linear or convolutional layer, and what is known about its inputs and outputs."""

    layer: nn.Module
    group: _Group  # of its outputs
    inputs: Channels | None
    foldable: Tensor  # [in], bool: constant inputs that a bias can replace
    read: Tensor  # [out, in], bool: weights that are not zero and no constant replaces

    def rows(self) -> Tensor:
        return self.group.root().keep

    def columns(self) -> Tensor:
        if self.inputs is None:
            return torch.ones(self.read.shape[1], dtype=torch.bool)
        return self.inputs.group.root().keep[self.inputs.channel]


class _Network:
    """What a recording says about the layers of a model."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._uses = recording.uses
        self._owners = Counter(
            id(tensor)
            for module in self._names
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
        self._known: dict[Value, Channels] = {}
        self._groups: list[_Group] = []
        self._products: list[_Product] = []
        self._apart: list[tuple[nn.Module, Channels]] = []  # batch norms, depthwise convolutions
        for call in recording.calls:
            self._follow(call)
        for value, channels in self._known.items():
            if value.escaped or value.uses == 0:
                channels.group.root().fixed = True

    def _follow(self, call: Call) -> None:
        values = tensors_in((call.args, call.kwargs), Value)
        inputs = [self._known[value] for value in values if value in self._known]
        if call.layer is not None and call.function in (*_PRODUCTS, F.batch_norm):
            channels = self._after_layer(call)
        else:
            channels = channels_after(call, self._known)
            if channels is not None:
                for each in inputs:
                    channels.group.join(each.group)
        if channels is not None and isinstance(call.result, Value):
            self._known[call.result] = channels
        else:
            for each in inputs:
                each.group.root().fixed = True

    def _after_layer(self, call: Call) -> Channels | None:
        layer: Any = call.layer
        normalises = call.function is F.batch_norm
        given = bound(call, *(_NORM_ARGUMENTS if normalises else _PRODUCT_ARGUMENTS))
        value, result = given.get("input"), call.result
        if not isinstance(value, Value) or not isinstance(result, Value):
            return None
        tensors = _NORM_TENSORS if normalises else _PRODUCT_TENSORS
        if normalises != (type(layer) in _NORMS) or not all(
            self._is_its_own(layer, name, given.get(name)) for name in tensors
        ):
            return None
        known = self._known.get(value)
        if normalises:
            return None if given.get("training") else self._after_norm(call, layer, value, known)
        dim = len(result.shape) + 1 - layer.weight.dim()
        if known is not None and known.dim != dim:
            return None
        padding = given.get("padding", 0)
        if isinstance(padding, str):
            padded = padding != "valid"
        else:
            padded = any(padding) if isinstance(padding, tuple) else padding != 0
        if given.get("groups", 1) == 1:
            return self._after_product(layer, known, result, dim, padded)
        return self._after_depthwise(layer, known, padded)

    def _is_its_own(self, layer: nn.Module, name: str, given: object) -> bool:
        """Return whether a call got this tensor of the layer, and nobody else has or uses it."""
        tensor = getattr(layer, name)
        if tensor is None or given is None:
            return tensor is given and name != "running_mean"
        plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
        alone = self._owners[id(tensor)] == 1 and self._uses[id(tensor)] == 1
        return tensor is given and plain and alone

    def _after_norm(
        self, call: Call, layer: nn.Module, value: Value, known: Channels | None
    ) -> Channels | None:
        if known is None or known.dim != 1:
            return None
        self._apart.append((layer, known))
        return dataclasses.replace(known, constant=call_on(call, {value: known.constant[None]})[0])

    def _after_product(
        self, layer: Any, known: Channels | None, result: Value, dim: int, padded: bool
    ) -> Channels | None:
        weight = layer.weight.detach()
        read = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        foldable = torch.zeros_like(read[0])
        if known is not None:
            if len(known.channel) != len(foldable):
                return None
            foldable = _foldable(known.constant, padded)
            read = read & ~foldable
        dead = ~read.any(1)
        outputs = _bias(layer)
        if known is not None:
            outputs[dead] += _folded(weight[dead], known, foldable)
        outputs[~dead] = torch.nan
        group = _Group(len(outputs))
        product = _Product(layer, group, known, foldable.cpu(), read.cpu())
        self._products.append(product)
        if known is not None:
            known.group.root().readers.append((product, known.channel))
        return Channels(group, dim, torch.arange(len(outputs)), outputs.to(result.dtype))

    def _after_depthwise(self, layer: Any, known: Channels | None, padded: bool) -> Channels | None:
        weight = layer.weight.detach()
        if known is None or not len(known.channel) == layer.groups == len(weight):
            return None
        if weight.shape[1] != 1:
            return None
        self._apart.append((layer, known))
        wide = wide_dtype(weight.device)
        kernel = weight.flatten(1).sum(1, dtype=wide)
        foldable = _foldable(known.constant, padded)
        outputs = _bias(layer) + kernel * known.constant.where(foldable, 0).to(wide)
        outputs[~foldable & weight.flatten(1).any(1)] = torch.nan
        return dataclasses.replace(known, constant=outputs.to(known.constant.dtype))

    def find_unread(self) -> None:
        """Drop channels that no layer reads, until no more can go; one of a group always stays."""
        roots = dict.fromkeys(product.group.root() for product in self._products)
        groups = [group for group in reversed(roots) if not group.fixed]
        changed = True
        while changed:
            changed = False
            for group in groups:
                read = torch.zeros_like(group.keep)
                for product, channel in group.readers:
                    read[channel[product.read[product.rows()].any(0)]] = True
                keep = group.keep & read
                if not keep.any():
                    keep[0] = True
                changed |= not torch.equal(keep, group.keep)
                group.keep = keep

    def shrink_(self, lines: list[str], undo: list[Undo]) -> None:
        """Give the layers the weights that are left; add a line on each, and what undoes it."""
        with torch.no_grad():
            for product in self._products:
                if not (product.rows().all() and product.columns().all()):
                    undo += _shrink_product_(product)
                    lines.append(self._line(product.layer, product.rows(), product.columns()))
            for layer, channels in self._apart:
                keep = channels.group.root().keep[channels.channel]
                if not keep.all():
                    undo += _shrink_apart_(layer, keep)
                    lines.append(self._line(layer, keep))

    def _line(self, layer: nn.Module, *kept: Tensor) -> str:
        before = "x".join(str(len(keep)) for keep in kept)
        after = "x".join(str(int(keep.sum())) for keep in kept)
        return f"{self._names[layer]}: {type(layer).__name__} {before} -> {after}"


def _foldable(constant: Tensor, padded: bool) -> Tensor:
    """Return which inputs a bias can replace: padding puts zeros beside them."""
    return constant == 0 if padded else constant.isfinite()


def _bias(layer: Any) -> Tensor:
    weight = layer.weight
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return bias.detach().to(wide_dtype(bias.device), copy=True)


def _folded(weight: Tensor, inputs: Channels, foldable: Tensor) -> Tensor:
    """Return what these constant inputs contribute to each output [out], in the widest dtype."""
    wide = wide_dtype(weight.device)
    chosen = weight[:, foldable].to(wide)
    if weight.dim() > 2:
        chosen = chosen.flatten(2).sum(2)
    return chosen @ inputs.constant[foldable].to(wide)


def _shrink_product_(product: _Product) -> list[Undo]:
    layer: Any = product.layer
    weight = layer.weight.detach()
    rows, columns = (keep.to(weight.device) for keep in (product.rows(), product.columns()))
    bias = None if layer.bias is None else layer.bias.detach()[rows]
    if product.inputs is not None:
        gone = product.foldable.to(weight.device) & ~columns
        more = _folded(weight[rows], product.inputs, gone)
        if more.any():
            bias = (_bias(layer)[rows] + more).to(weight.dtype)
    names = ("in_features", "out_features")
    if type(layer) is not nn.Linear:
        names = ("in_channels", "out_channels")
    undo = [_replace_(layer, "weight", weight[rows][:, columns])]
    if bias is not None:
        undo.append(_replace_(layer, "bias", bias))
    sizes = (int(columns.sum()), int(rows.sum()))
    return undo + [_set_(layer, *each) for each in zip(names, sizes, strict=True)]


def _shrink_apart_(layer: Any, keep: Tensor) -> list[Undo]:
    norm = type(layer) in _NORMS
    undo = []
    for name in _NORM_TENSORS if norm else _PRODUCT_TENSORS:
        tensor = getattr(layer, name)
        if tensor is not None:
            undo.append(_replace_(layer, name, tensor.detach()[keep.to(tensor.device)]))
    numbers = ("num_features",) if norm else ("in_channels", "out_channels", "groups")
    return undo + [_set_(layer, name, int(keep.sum())) for name in numbers]


def _replace_(layer: nn.Module, name: str, tensor: Tensor) -> Undo:
    """Replace a Parameter or a buffer by one of the same kind."""
    stored: Any = layer._buffers if name in layer._buffers else layer._parameters
    old = stored[name]
    if stored is layer._parameters:
        like: Any = layer.weight if old is None else old
        tensor = nn.Parameter(tensor, like.requires_grad)
    stored[name] = tensor
    return partial(stored.__setitem__, name, old)


def _set_(layer: nn.Module, name: str, number: int) -> Undo:
    old = getattr(layer, name)
    setattr(layer, name, number)
    mark_shrunk_(layer)
    return partial(setattr, layer, name, old)
