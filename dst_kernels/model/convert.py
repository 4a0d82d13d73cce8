"""One-call conversion of a user's own model, and the plan that says what it would do and why."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedGRU,
    MaskedLinear,
    MaskedLSTM,
    MaskedModule,
    MaskedRNN,
    MaskOptions,
)
from ..nn.in_place import let_read_, mask_module_, masked_class, unmask_module_
from ..nn.parameters import MaskedParameters, mask_parameters_, threshold_name
from ..nn.reading import Readable
from ..ops.dtensor import is_dtensor
from ._masked_by_parameter import layouts_of
from ._transformer_encoder import avoid_fast_path
from ._weight_readers import (
    bypassed_layers,
    is_reader,
    reads_a_weight,
    what_writes_its_weight,
)
from .config import SparsifyConfig

logger = logging.getLogger(__name__)

FilterFn = Callable[[nn.Module, str], bool]

_MASKED = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
    nn.LSTM: MaskedLSTM,
    nn.GRU: MaskedGRU,
    nn.RNN: MaskedRNN,
}

_TRANSFORMERS_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """A module with weights: what becomes of it ("convert", "masked" already, "skip") and why.

    A layer to convert has a reason only where it would not train as it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    action: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """Every module that owns a weight of two dimensions or more; `print` shows a table."""

    layers: list[PlannedLayer]

    def named(self, action: str) -> list[str]:
        """The names of the layers with this action."""
        return [layer.name for layer in self.layers if layer.action == action]

    def summary(self) -> str:
        """One line."""
        convert, masked, skip = (len(self.named(a)) for a in ("convert", "masked", "skip"))
        return f"{convert} layers to convert, {masked} masked already, {skip} skipped"

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


def plan_sparsify(
    model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None
) -> ConversionPlan:
    """What `sparsify_` with the same arguments would do; changes nothing."""
    return _plan(model, SparsifyConfig() if config is None else config, filter_fn)[0]


def sparsify_(
    model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """Make linear, convolutional and recurrent layers masked ones; returns `model`.

    In place: every module stays the same object, with its Parameters, hooks, methods and
    attributes, so that lists, aliases and closures that hold it go on. Its class becomes a subclass
    of the one it has: `isinstance(layer, MaskedLinear)` holds, and so does `isinstance(layer,
    TheUsersClass)`. With thresholds at 0 the outputs stay the same. Weights shared between layers
    stay shared and share their threshold. A second call changes nothing. Convert before building
    the optimizer, `torch.compile`, DDP or `fully_shard`. `finalize_` and `densify_` lead back.

    `config` (default: `SparsifyConfig()`) chooses options and layers; `filter_fn(module, name)`
    is asked about each layer the config would convert and keeps it dense by returning False.
    What happens to each layer is logged; `plan_sparsify` returns the same as an object.
    """
    config = SparsifyConfig() if config is None else config
    plan, chosen = _plan(model, config, filter_fn)
    thresholds = {
        id(part.weight): part.threshold
        for module in model.modules()
        if isinstance(module, MaskedModule)
        for part in module.masked_weights()
    }
    done: list[MaskedModule] = []
    try:
        for module in chosen:
            layouts = layouts_of(module, config)
            if layouts:
                done.append(mask_parameters_(module, layouts, config.mask_options()))
            else:
                done.append(mask_module_(module, _masked_type(module), config.mask_options()))
    except Exception:  # all or nothing
        for module in done:
            unmask_module_(module)
        raise
    for module in done:
        for part in module.masked_weights():
            shared = thresholds.setdefault(id(part.weight), part.threshold)
            setattr(module, part.threshold_name, shared)
    _let_forwards_read_(model)
    avoid_fast_path(model)
    for layer in plan.layers:
        if layer.action == "convert" and layer.reason:
            logger.warning("%s (%s): %s", layer.name or "(root)", layer.type, layer.reason)
        logger.debug("%s %s (%s) %s", layer.action, layer.name, layer.type, layer.reason)
    logger.info("sparsify_: %s", plan.summary())
    return model


def _plan(
    model: nn.Module, config: SparsifyConfig, filter_fn: FilterFn | None
) -> tuple[ConversionPlan, list[nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    if not isinstance(config, SparsifyConfig):
        raise TypeError(f"config must be a SparsifyConfig, but is a {type(config).__name__}")
    named = [(name, module) for name, module in model.named_modules() if _has_weights(module)]
    bypassed = bypassed_layers(model)
    reasons: dict[nn.Module, str] = {}
    for _, module in named:
        reason = bypassed.get(module) or _cannot_convert(module, config)
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
    return ConversionPlan(layers), chosen


def _with_rows_elsewhere(
    named: list[tuple[str, nn.Module]], reasons: dict[nn.Module, str], config: SparsifyConfig
) -> dict[nn.Module, str]:
    """Layers that share a weight, rows of which for one are not rows for another: why they stay.

    A convolution's and a transposed one's, say, where a decoder is tied to an encoder.
    """
    owners: dict[int, list[tuple[str, nn.Module, object]]] = {}
    for name, module in named:
        if module not in reasons or isinstance(module, MaskedModule):
            if isinstance(module, MaskedModule):
                masked: type[MaskedModule] = type(module)
            else:
                masked = MaskedParameters if layouts_of(module, config) else _masked_type(module)
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
    """Whether the module itself, not a child, owns something a mask could be put on."""
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


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn class that `module` behaves as, if we have a masked twin of it."""
    for base in _MASKED:
        if isinstance(module, base):
            return base
    return None


def _weight_names(module: nn.Module, config: SparsifyConfig) -> list[str]:
    """Of what is masked in a module or would be in its twin."""
    if isinstance(module, MaskedModule):
        return [part.name for part in module.masked_weights()]
    layouts = layouts_of(module, config)
    if layouts:
        return list(layouts)
    flat = module._flat_weights_names if isinstance(module, nn.RNNBase) else ["weight"]
    return [name for name in flat if name.startswith("weight")]


def _weights(module: nn.Module, config: SparsifyConfig) -> list[Tensor]:
    return [getattr(module, name) for name in _weight_names(module, config)]


def _masked_type(module: nn.Module) -> type[MaskedModule]:
    base = _base(module)
    if base is not None:
        return _MASKED[base]
    from ..nn.huggingface import MaskedTransformersConv1D

    return MaskedTransformersConv1D


def _cannot_convert(module: nn.Module, config: SparsifyConfig) -> str | None:
    """Why there is no masked layer that would compute the same, or None."""
    if isinstance(module, MaskedModule):
        return "masked already"
    if isinstance(module, LazyModuleMixin):
        return "has no weights yet: run a forward before converting"
    kind: type = type(module)
    base, layouts = _base(module), layouts_of(module, config)
    if is_parametrized(module) and not layouts:
        return "is parametrized: its weight is computed, not stored"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not layouts:
        return "is an embedding: masked with SparsifyConfig(embeddings=True), unless it is sparse"
    if not layouts and base is None and _qualified(type(module)) != _TRANSFORMERS_CONV1D:
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
        if is_dtensor(weight):
            return "is sharded already: convert before fully_shard"
    masked, names = (MaskedParameters if layouts else _masked_type(module)), tuple(layouts)
    path = config.path
    if path not in masked.accepted_paths:
        return f"has no path {path!r}, only {' and '.join(masked.accepted_paths)}"
    try:
        masked_class(kind, masked, names=names)
    except Exception as error:  # whatever a metaclass or __init_subclass__ of the user's raises
        return f"is of a class from which none can be derived ({error})"
    in_the_way = [n for n in _names_needed(module, masked, config) if hasattr(module, n)]
    if in_the_way:
        return f"has an attribute {in_the_way[0]!r} of its own, a name that masked layers need"
    return None


# What a masked module has for its user, but does not need: a user's own go before these.
_CONVENIENT = {
    "mask", "remaining_ratio", "gathered", "reset_threshold", "reset_parameters", "from_dense",
    "to_dense",
    *MaskOptions._fields,
}  # fmt: skip


def _names_needed(
    module: nn.Module, masked: type[MaskedModule], config: SparsifyConfig
) -> list[str]:
    """Attributes by which a masked module works, its Parameters first."""
    thresholds = [
        threshold_name(name) if masked is MaskedParameters else name.replace("weight", "threshold")
        for name in _weight_names(module, config)
    ]
    own = {n for c in masked.__mro__ if issubclass(c, MaskedModule) for n in vars(c)}
    others = own - _CONVENIENT - {"weight"} - set(dir(masked.dense_type))
    return [*thresholds, "masking", *sorted(n for n in others if not n.startswith("__"))]


def _warning(module: nn.Module, config: SparsifyConfig) -> str:
    """What goes wrong in training a layer that can be converted, or nothing."""
    for weight in _weights(module, config):
        unknown = weight.is_meta or isinstance(weight, FakeTensor) or weight.numel() == 0
        if not unknown and not weight.any():
            return (
                "all its weights are 0, and a pruned 0 gets no gradient: "
                "initialise it before training"
            )
    return ""


def _unwanted(
    module: nn.Module,
    name: str,
    config: SparsifyConfig,
    able: list[nn.Module],
    filter_fn: FilterFn | None,
) -> str | None:
    """Why config or filter_fn keep a convertible layer dense, or None."""
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


def _let_forwards_read_(model: nn.Module) -> None:
    """Let every forward that may read the weights of modules below it find the masked ones."""
    for module in list(model.modules()):
        if is_reader(module):
            reads = [
                (below, part.name)
                for below in module.modules()
                if below is not module and isinstance(below, MaskedModule)
                for part in below.masked_weights()
                if isinstance(getattr(type(below), part.name, None), Readable)
            ]
            if reads:
                let_read_(module, reads)


def _owners_of_parameters(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners
