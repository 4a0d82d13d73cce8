"""What all masked layers share: the threshold, the committed guard, conversion, state dicts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from .._backends import resolve
from .._checks import check_effective_threshold, check_surrogate
from .._dtensor import full_tensor, is_dtensor, reset_shard
from .._plan import PATHS, check_path
from ._deferral import Deferral
from ._reuse import packs_of

__all__ = ["GRANULARITIES", "MaskedLayer"]

GRANULARITIES = ("row", "layer", "element")
OPTIONS = ("granularity", "reset_ratio", "surrogate", "structure_gradient", "backend", "path")

logger = logging.getLogger(__name__)


class MaskedLayer:
    """Mixin that goes before a `torch.nn` layer with a `weight`; see `MaskedLinear`.

    Attributes:
        threshold: Parameter, float32 (float64 beside a float64 weight) whatever the weight's
            dtype, of shape [rows], [1] or the weight's, by `granularity`.
        granularity, reset_ratio, surrogate, structure_gradient, backend, path: as given.
    """

    dense_type: ClassVar[type[nn.Module]]
    paths: ClassVar[tuple[str, ...]] = PATHS  # that its products can take
    _sharded_threshold: Tensor | None = None
    _deferral: Deferral | None = None
    _is_replica = False  # DataParallel sets it
    _attached: object = None  # see _group.py

    def _init_masking(
        self,
        granularity: str,
        reset_ratio: float | None,
        surrogate: str,
        structure_gradient: bool,
        backend: str,
        path: str,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, but is {granularity!r}"
            )
        check_surrogate(surrogate)
        resolve(backend)
        check_path(path, self.paths)
        self.granularity = granularity
        self.reset_ratio = reset_ratio
        self.surrogate = surrogate
        self.structure_gradient = structure_gradient
        self.backend = backend
        self.path = path
        rows = self._rows(self.weight)
        shape = {
            "row": [rows.shape[0]],
            "layer": [1],  # not 0-dim: FSDP2 shards no scalars
            "element": self.weight.shape,
        }[granularity]
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.threshold = nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.weight.device))
        check_effective_threshold(rows, self._rows(self.threshold), reset_ratio)

    # -- the layer's own operations ------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Weight and bias as the parent does, thresholds to 0."""
        super().reset_parameters()
        if "threshold" in self._parameters:  # the parent's __init__ calls this before it exists
            self.reset_threshold()

    @torch.no_grad()
    def reset_threshold(self, value: float = 0.0) -> None:
        """Set every threshold to `value`; at 0 all weights but exact zeros are kept."""
        self.threshold.fill_(value)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape, True where a weight is kept; no synchronisation."""
        weight, threshold = self.gathered()
        return self._rows(F.threshold_mask(weight, threshold, reset_ratio=self.reset_ratio))

    @torch.no_grad()
    def remaining_ratio(self) -> Tensor:
        """Kept weights / all weights, a 0-dim float32 tensor on the layer's device."""
        weight, threshold = self.gathered()
        return F.remaining_ratio(weight, threshold, reset_ratio=self.reset_ratio)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._masking_repr()}"

    def _masking_repr(self) -> str:
        return (
            f"granularity={self.granularity}, reset_ratio={self.reset_ratio}, "
            f"surrogate={self.surrogate}, structure_gradient={self.structure_gradient}, "
            f"backend={self.backend}, path={self.path}"
        )

    # -- for forward ---------------------------------------------------------------------------

    def _rows(self, tensor: Tensor) -> Tensor:
        """Weight-shaped tensors with output rows first; layers that store them otherwise override.

        Must be its own inverse and leave tensors of one dimension alone.
        """
        return tensor

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold), output rows first, whole where FSDP2 keeps them sharded."""
        return self._rows(full_tensor(self.weight)), self._rows(full_tensor(self.threshold))

    def _operands(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold) as the layer's operation takes them."""
        return self._rows(self.weight), self._rows(self.threshold)

    def _masked(self, operation: Callable, input: Tensor, bias: Tensor | None, *geometry) -> Tensor:
        """The layer's output; in training a reset of the thresholds is committed.

        What autograd saves is the effective threshold, a tensor of its own, so that a commit
        between a forward and its backward (a layer used twice, a second forward) does no harm.
        """
        weight, threshold = self._operands()
        reuse = None
        if not torch.compiler.is_compiling() and self._sharded_threshold is None:
            reuse = packs_of(self)
        output, effective = operation(
            input,
            weight,
            threshold,
            bias,
            *geometry,
            reset_ratio=self.reset_ratio,
            surrogate=self.surrogate,
            structure_gradient=self.structure_gradient,
            backend=self.backend,
            path=self.path,
            recall=None if reuse is None else reuse.get,
            # FSDP2 frees the gathered weight until backward; a copy of it would undo that.
            keep_packed=self._sharded_threshold is None,
            dense_gradient=self.deferral() is not None,
        )
        if self.training and self.reset_ratio is not None:
            with torch.no_grad():
                if self._sharded_threshold is not None:
                    reset_shard(self._sharded_threshold, threshold, effective)
                threshold.copy_(effective)
            if reuse is not None:
                reuse.threshold_was_committed(threshold)
        return output

    def deferral(self) -> Deferral | None:
        """What an optimizer of `dst_kernels.optim` makes this layer's gradients with, if one does.

        A frozen weight has no gradient that could be deferred, so its threshold gets its own.
        """
        deferral = self._deferral
        if deferral is None or not self.weight.requires_grad:
            return None
        return deferral if torch.compiler.is_compiling() or deferral.serves(self) else None

    # -- torch.nn.Module machinery -------------------------------------------------------------

    def __getstate__(self) -> dict:
        """A copy of the layer belongs to no optimizer and to no forward that is under way."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_deferral", "_attached")}

    def __setattr__(self, name: str, value: object) -> None:
        # During forward FSDP2 puts a gathered copy in the parameter's place and drops it after;
        # a committed reset must also reach the shard, which is seen when FSDP2 sets it here.
        if name == "threshold" and isinstance(value, Tensor) and is_dtensor(value):
            self.__dict__["_sharded_threshold"] = value
        super().__setattr__(name, value)

    def _apply(self, fn, recurse: bool = True):
        """Conversions move the threshold, but never below float32: its updates would round away."""
        threshold, grad = self.threshold, self.threshold.grad

        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor is threshold or tensor is grad:
                dtype = torch.promote_types(converted.dtype, torch.float32)
                if converted.dtype != dtype:
                    converted = tensor.to(device=converted.device, dtype=dtype)
            return converted

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ) -> None:
        """A dense checkpoint has no threshold: it starts at 0, which keeps every weight."""
        key, weight = prefix + "threshold", state_dict.get(prefix + "weight")
        threshold = state_dict.get(key)
        if threshold is None and weight is not None:
            if is_dtensor(self.threshold):
                threshold = torch.zeros_like(self.threshold)
            else:
                dtype = torch.promote_types(self.threshold.dtype, weight.dtype)
                threshold = torch.zeros_like(self.threshold, dtype=dtype, device=weight.device)
            _log_missing_once(missing_keys)
        elif threshold is not None:
            threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
        if threshold is not None:
            state_dict = {**state_dict, key: threshold}
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    # -- dense and back ------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        *,
        granularity: str = "row",
        reset_ratio: float | None = 0.01,
        surrogate: str = "long_tailed",
        structure_gradient: bool = True,
        backend: str = "auto",
        path: str = "auto",
    ):
        """A masked layer with the same Parameters, mode, hooks and attributes; thresholds at 0.

        Raises TypeError where `dense` is not of the type this class replaces.
        """
        if not isinstance(dense, cls.dense_type) or isinstance(dense, MaskedLayer):
            raise TypeError(
                f"dense must be a {cls.dense_type.__name__}, but is a {type(dense).__name__}"
            )
        layer = _retyped(dense, cls)
        layer._init_masking(granularity, reset_ratio, surrogate, structure_gradient, backend, path)
        return layer

    def to_dense(self) -> nn.Module:
        """The plain `torch.nn` layer with weight * mask baked in; shares the bias.

        Raises RuntimeError where the weight is sharded.
        """
        if is_dtensor(self.weight):
            raise RuntimeError(
                "a sharded layer cannot be made dense: gather the state dict and load it into an "
                "unsharded model first"
            )
        layer = _retyped(self, self.dense_type)
        for name in OPTIONS:
            del layer.__dict__[name]
        for name in ("_deferral", "_attached"):
            layer.__dict__.pop(name, None)
        del layer._parameters["threshold"]
        with torch.no_grad():
            baked = F.masked_weight(*self.gathered(), reset_ratio=self.reset_ratio)
            # In the weight's layout, which `_rows` may have lost.
            baked = torch.empty_like(self.weight).copy_(self._rows(baked))
        layer.weight = nn.Parameter(baked, requires_grad=self.weight.requires_grad)
        return layer


def _retyped(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A shallow copy of `module` as a `cls`, to take its place.

    Hooks are shared, so that a handle from before still removes its hook.
    """
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = module.__dict__[name].copy()
    return new


_last_missing_keys: list[str] | None = None


def _log_missing_once(missing_keys: list[str]) -> None:
    """One line per load_state_dict, however many layers: they all get the same list."""
    global _last_missing_keys
    if _last_missing_keys is not missing_keys:
        _last_missing_keys = missing_keys
        logger.warning("the state dict has no thresholds (a dense checkpoint?): they start at 0")
