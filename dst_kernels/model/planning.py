"""Plan a conversion: what each module with weights becomes, and why."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..arguments import require, require_module
from ..nn import (
    MaskedModule,
    MaskOptions,
)
from ..nn.in_place import masked_class
from ..nn.parameters import MaskedParameters, threshold_name
from ..ops.dtensor import is_dtensor
from ._kinds import has_twin, layouts_of, masked_type
from ._weight_readers import bypassed_layers, reads_a_weight, what_writes_its_weight
from .config import SparsifyConfig

_PEFT = "peft.tuners.tuners_utils"
_DDP = nn.parallel.DistributedDataParallel


def _wrappers() -> tuple[type, ...]:
    """Return the classes that read the parameters of a module only once, when they wrap it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if not imported, no module has its class
    return (_DDP,) if fsdp is None else (_DDP, fsdp.FullyShardedDataParallel)


FilterFn = Callable[[nn.Module, str], bool]


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """Say what a module with weights becomes ("convert", "skip"; "masked": it is already) and why.

    For a layer to convert, `reason` is empty, or a warning that it would not train well as it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    action: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """List every module that owns a weight of two dimensions or more; `print` shows a table.

    masked: the number of weights that will be masked, or are already. total: the number of all
    weights (parameters of two dimensions or more). Shared ones count once.
    """

    layers: list[PlannedLayer]
    masked: int
    total: int

    def named(self, action: str) -> list[str]:
        """Return the names of the layers with this action."""
        return [layer.name for layer in self.layers if layer.action == action]

    def summary(self) -> str:
        """Return one line: how many layers, and the masked share of all weights."""
        convert, masked, skip = (len(self.named(a)) for a in ("convert", "masked", "skip"))
        counts = f"{convert} layers to convert, {masked} masked already, {skip} skipped"
        return f"{counts}; {self.share():.1%} of all weights masked" if self.total else counts

    def share(self) -> float:
        """Return the masked share of all weights; 1 if there are none."""
        return self.masked / self.total if self.total else 1.0

    def __str__(self) -> str:
        rows = [
            (layer.action, layer.name or "(root)", layer.type, "x".join(map(str, layer.shape)))
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            + (f"  {layer.reason}" if layer.reason else "")
            for row, layer in zip(rows, self.layers, strict=True)
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])


def plan_conversion(
    model: nn.Module, config: SparsifyConfig, filter_fn: FilterFn | None
) -> tuple[ConversionPlan, list[nn.Module]]:
    """Return the plan of a conversion, and the modules to convert."""
    require_module(model)
    accepted = "a function of a module and its name, or None"
    require(filter_fn is None or callable(filter_fn), "filter_fn", accepted, filter_fn)
    wrapped = [m for m in model.modules() if isinstance(m, _wrappers())]
    if wrapped:
        raise ValueError(
            f"model holds a {type(wrapped[0]).__name__}, which would not train the thresholds: "
            "convert the module before wrapping it"
            + ("" if isinstance(wrapped[0], _DDP) else " (and use fully_shard, FSDP2)")
        )
    require(isinstance(config, SparsifyConfig), "config", "a SparsifyConfig or None", config)
    named = [(name, module) for name, module in model.named_modules() if _has_weights(module)]
    bypassed = bypassed_layers(model)
    reasons = dict.fromkeys(_adapters(model), "is part of an adapter: small, and some start at 0")
    for _, module in named:
        reason = reasons.get(module) or bypassed.get(module) or _cannot_convert(module, config)
        if reason:
            reasons[module] = reason
    able = [module for _, module in named if module not in reasons]
    for name, module in named:
        if module not in reasons:
            reason = _unwanted(module, name, config, able, filter_fn)
            if reason:
                reasons[module] = reason
    owners = _owners_of_parameters(model)  # including those that were never candidates
    if config.granularity == "row":
        reasons.update(_with_rows_elsewhere(named, reasons, config))
    for _, module in named:
        if module not in reasons:
            dense = [
                owner_name
                for weight in _weights(module, config)
                for owner_name, owner in owners.get(id(weight), ())
                if owner in reasons and not isinstance(owner, MaskedModule)
            ]
            if dense:
                reasons[module] = f"shares its weight with {dense[0]}, which stays dense"
    layers = []
    for name, module in named:
        masked = isinstance(module, MaskedModule)
        action = "masked" if masked else "skip" if module in reasons else "convert"
        layers.append(
            PlannedLayer(
                name=name,
                type=type(module).__name__,
                shape=_shape(module),
                action=action,
                reason="" if masked else reasons.get(module) or _warning(module, config),
            )
        )
    chosen = [module for _, module in named if module not in reasons]
    already = [module for _, module in named if isinstance(module, MaskedModule)]
    masked_ids = {id(w): w.numel() for m in (*chosen, *already) for w in _weights(m, config)}
    thresholds = {id(p.threshold) for m in already for p in m.masked_weights()}
    others = {
        id(p): p.numel()
        for p in model.parameters()
        if not is_lazy(p) and p.dim() >= 2 and id(p) not in thresholds
    }
    total = sum({**others, **masked_ids}.values())
    return ConversionPlan(layers, sum(masked_ids.values()), total), chosen


def _adapters(model: nn.Module) -> list[nn.Module]:
    """Return the modules that peft has added to layers (LoRA, IA3, ...), not the layers."""
    return [
        added
        for module in model.modules()
        if any(
            c.__name__ == "BaseTunerLayer" and c.__module__ == _PEFT for c in type(module).__mro__
        )
        for name, child in module.named_children()
        if name != "base_layer"
        for added in child.modules()
    ]


def _with_rows_elsewhere(
    named: list[tuple[str, nn.Module]], reasons: dict[nn.Module, str], config: SparsifyConfig
) -> dict[nn.Module, str]:
    """Return why layers stay dense that share a weight with one that has other rows.

    An example is a decoder of transposed convolutions whose weights are tied to the encoder's.
    """
    owners: dict[int, list[tuple[str, nn.Module, object]]] = {}
    for name, module in named:
        if module not in reasons or isinstance(module, MaskedModule):
            if isinstance(module, MaskedModule):
                masked: type[MaskedModule] = type(module)
            else:
                masked = MaskedParameters if layouts_of(module, config) else masked_type(module)
            first = masked.rows_first
            rows = "first" if first else (masked._rows, getattr(module, "groups", 1))
            for weight in _weights(module, config):
                owners.setdefault(id(weight), []).append((name, module, rows))
    return {
        module: f"shares its weight with {other}, for which its rows lie elsewhere"
        for sharing in owners.values()
        for _, module, rows in sharing
        for other, _, others_rows in sharing
        if rows != others_rows and not isinstance(module, MaskedModule)
    }


def _has_weights(module: nn.Module) -> bool:
    """Return whether the module itself, not a child, owns a weight that could be masked."""
    if isinstance(module, LazyModuleMixin) or is_parametrized(module):
        return True
    if isinstance(module, ParametrizationList):  # belongs to the module that it computes for
        return False
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, LazyModuleMixin):
        return ()
    weights = [p for p in module.parameters() if p.dim() >= 2]
    return tuple(weights[0].shape) if weights else ()


def _weight_names(module: nn.Module, config: SparsifyConfig) -> list[str]:
    """Return the names of the weights that are masked in a module, or would be."""
    if isinstance(module, MaskedModule):
        return [part.name for part in module.masked_weights()]
    layouts = layouts_of(module, config)
    if layouts:
        return list(layouts)
    flat = module._flat_weights_names if isinstance(module, nn.RNNBase) else ["weight"]
    return [name for name in flat if name.startswith("weight")]


def _weights(module: nn.Module, config: SparsifyConfig) -> list[Tensor]:
    return [getattr(module, name) for name in _weight_names(module, config)]


def _cannot_convert(module: nn.Module, config: SparsifyConfig) -> str | None:
    """Return why no masked layer would compute the same, or None if one does."""
    if isinstance(module, MaskedModule):
        return "masked already"
    if isinstance(module, LazyModuleMixin):
        return "has no weights yet: run a forward before converting"
    kind: type = type(module)
    layouts = layouts_of(module, config)
    if is_parametrized(module) and not layouts:
        return "is parametrized: its weight is computed, not stored"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not layouts:
        return "is an embedding: masked with SparsifyConfig(embeddings=True), unless it is sparse"
    if not layouts and not has_twin(module):
        return f"there is no masked {type(module).__name__}"
    if isinstance(module, nn.RNNBase) and reads_a_weight(kind, "forward"):
        return f"is a recurrent {kind.__name__} with a forward of its own that reads weights"
    if kind.__call__ is not nn.Module.__call__ and reads_a_weight(kind, "__call__"):
        return f"is a {kind.__name__} with a __call__ of its own that reads its weight"
    write = what_writes_its_weight(kind)
    if write is not None:
        return f"has {write} in a forward of its own, where only the masked weight could be reached"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for name in _weight_names(module, config):
        weight = getattr(module, name) if layouts else module._parameters.get(name)
        if weight is None:
            return f"its {name} is not a parameter"
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return f"its {name} is {weight.dtype}"
        if weight.layout is not torch.strided:
            return f"its {name} is sparse ({weight.layout})"
        if is_dtensor(weight):
            return "is sharded already: convert before fully_shard"
    masked, names = (MaskedParameters if layouts else masked_type(module)), tuple(layouts)
    path = config.path
    if path not in masked.accepted_paths:
        return f"has no path {path!r}, only {' and '.join(masked.accepted_paths)}"
    try:
        masked_class(kind, masked, names=names)
    except Exception as error:  # a user's metaclass or __init_subclass__ may raise anything
        return f"is of a class from which none can be derived ({error})"
    in_the_way = [n for n in _names_needed(module, masked, config) if hasattr(module, n)]
    if in_the_way:
        return f"has an attribute {in_the_way[0]!r} of its own, a name that masked layers need"
    return None


# Methods and options that a masked module offers but does not need: a user's own names hide them.
_CONVENIENT = {
    "mask", "remaining_ratio", "gathered", "reset_threshold", "reset_parameters", "from_dense",
    "to_dense",
    *MaskOptions._fields,
}  # fmt: skip


def _names_needed(
    module: nn.Module, masked: type[MaskedModule], config: SparsifyConfig
) -> list[str]:
    """Return the attribute names that a masked module needs, those of its Parameters first."""
    thresholds = [
        threshold_name(name) if masked is MaskedParameters else name.replace("weight", "threshold")
        for name in _weight_names(module, config)
    ]
    own = {n for c in masked.__mro__ if issubclass(c, MaskedModule) for n in vars(c)}
    others = own - _CONVENIENT - {"weight"} - set(dir(masked.dense_type))
    return [*thresholds, "masking", *sorted(n for n in others if not n.startswith("__"))]


def _warning(module: nn.Module, config: SparsifyConfig) -> str:
    """Return what goes wrong in training a layer that can be converted; "" if nothing does."""
    for weight in _weights(module, config):
        unknown = weight.is_meta or isinstance(weight, FakeTensor) or weight.numel() == 0
        if unknown:
            continue
        zeros = weight == 0
        share, rows = zeros.float().mean().item(), int(zeros.flatten(1).all(1).sum())
        if share < 0.01 and not rows:
            continue
        what = "all its weights are 0" if share == 1 else f"{share:.0%} of its weights are 0"
        if 0 < rows < len(weight):
            what += f" ({rows} of {len(weight)} rows entirely)"
        return f"{what}, and a pruned 0 gets no gradient: initialise it before training"
    return ""


def _unwanted(
    module: nn.Module,
    name: str,
    config: SparsifyConfig,
    able: list[nn.Module],
    filter_fn: FilterFn | None,
) -> str | None:
    """Return why config or filter_fn keep a convertible layer dense, or None."""
    if config.skip_first and module is able[0]:
        return "skip_first"
    if config.skip_last and module is able[-1]:
        return "skip_last"
    groups = getattr(module, "groups", 1)
    if config.skip_depthwise and groups > 1 and groups == module.in_channels:
        return "skip_depthwise"
    size = sum(weight.numel() for weight in _weights(module, config))
    if size < config.min_numel:
        return f"min_numel: {size} < {config.min_numel} weights"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn"
    return None


def _owners_of_parameters(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners
