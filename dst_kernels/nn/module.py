"""What all masked modules share: options, thresholds, dense and back, state dicts.

A module has one masked weight (`layer.py`) or several (`recurrent.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ..backends import resolve
from ..ops.checks import check_effective_threshold, check_surrogate
from ..ops.dtensor import full_tensor, is_dtensor
from ..plan import PATHS, check_path

__all__ = ["GRANULARITIES", "OPTIONS", "MaskedModule", "MaskedWeight"]

GRANULARITIES = ("row", "layer", "element")
OPTIONS = ("granularity", "reset_ratio", "surrogate", "structure_gradient", "backend", "path")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """A weight of a masked module and its thresholds.

    Args:
        name, threshold_name: of the module's Parameters.
        matrices: how many lie in the weight, one after the other along its rows; the collapse
            guard sees each of them by itself.
    """

    module: MaskedModule
    name: str = "weight"
    threshold_name: str = "threshold"
    matrices: int = 1

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def threshold(self) -> Tensor:
        return getattr(self.module, self.threshold_name)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """(weight, threshold), output rows first, whole where FSDP2 keeps them sharded."""
        rows = self.module._rows
        return rows(full_tensor(self.weight)), rows(full_tensor(self.threshold))

    def effective(self) -> tuple[Tensor, Tensor]:
        """As `gathered`, with the effective threshold."""
        weight, threshold = self.gathered()
        ratio = self.module.reset_ratio
        if self.matrices == 1:
            return weight, F.effective_threshold(weight, threshold, reset_ratio=ratio)
        pairs = zip(weight.chunk(self.matrices), threshold.chunk(self.matrices), strict=True)
        found = [F.effective_threshold(*pair, reset_ratio=ratio) for pair in pairs]
        return weight, torch.cat(found)

    def each_row(self, threshold: Tensor) -> Tensor:
        """A threshold for each row where there is one for each matrix, else as it is."""
        if self.matrices == 1 or threshold.numel() != self.matrices:
            return threshold
        return threshold.repeat_interleave(self.weight.shape[0] // self.matrices)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape, True where a weight is kept; no synchronisation."""
        weight, threshold = self.effective()
        mask = F.threshold_mask(weight, self.each_row(threshold), reset_ratio=None)
        return self.module._rows(mask)

    @torch.no_grad()
    def baked(self) -> Tensor:
        """weight * mask, in the weight's layout."""
        weight, threshold = self.effective()
        masked = F.masked_weight(weight, self.each_row(threshold), reset_ratio=None)
        # `_rows` may have lost the layout.
        return torch.empty_like(self.weight).copy_(self.module._rows(masked))


class MaskedModule:
    """Mixin that goes before a `torch.nn` module.

    Attributes:
        granularity, reset_ratio, surrogate, structure_gradient, backend, path: as given.
    """

    dense_type: ClassVar[type[nn.Module]]
    paths: ClassVar[tuple[str, ...]] = PATHS  # that its products can take

    def masked_weights(self) -> Sequence[MaskedWeight]:
        """Every weight that is masked."""
        raise NotImplementedError

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
        for part in self.masked_weights():
            setattr(self, part.threshold_name, self._new_threshold(part))

    def _new_threshold(self, part: MaskedWeight) -> nn.Parameter:
        weight = part.weight
        rows = self._rows(weight)
        shape = {
            "row": [rows.shape[0]],
            "layer": [part.matrices],  # never 0-dim: FSDP2 shards no scalars
            "element": weight.shape,
        }[self.granularity]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        threshold = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        one = rows.chunk(part.matrices)[0], self._rows(threshold).chunk(part.matrices)[0]
        check_effective_threshold(*one, self.reset_ratio)
        return threshold

    def reset_parameters(self) -> None:
        """Weights and biases as the parent does, thresholds to 0."""
        super().reset_parameters()
        if hasattr(self, "granularity"):  # the parent's __init__ calls this before there are any
            self.reset_threshold()

    @torch.no_grad()
    def reset_threshold(self, value: float = 0.0) -> None:
        """Set every threshold to `value`; at 0 all weights but exact zeros are kept."""
        for part in self.masked_weights():
            part.threshold.fill_(value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._masking_repr()}"

    def _masking_repr(self) -> str:
        return (
            f"granularity={self.granularity}, reset_ratio={self.reset_ratio}, "
            f"surrogate={self.surrogate}, structure_gradient={self.structure_gradient}, "
            f"backend={self.backend}, path={self.path}"
        )

    def _rows(self, tensor: Tensor) -> Tensor:
        """Weight-shaped tensors with output rows first; layers that store them otherwise override.

        Must be its own inverse and leave tensors of one dimension alone.
        """
        return tensor

    # -- torch.nn.Module machinery -------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        """Conversions move thresholds, but never below float32: their updates would round away."""
        thresholds = [part.threshold for part in self.masked_weights()]
        kept = [t for t in (*thresholds, *(t.grad for t in thresholds)) if t is not None]

        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if any(tensor is each for each in kept):
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
        """A dense checkpoint has no thresholds: they start at 0, which keeps every weight."""
        found = {}
        for part in self.masked_weights():
            key = prefix + part.threshold_name
            threshold, weight = state_dict.get(key), state_dict.get(prefix + part.name)
            if threshold is not None:
                found[key] = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
            elif weight is not None:
                found[key] = _zeros(part.threshold, weight)
                _log_missing_once(missing_keys)
        super()._load_from_state_dict(
            {**state_dict, **found} if found else state_dict,
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
        """A masked module with the same Parameters, mode, hooks and attributes; thresholds at 0.

        Raises TypeError where `dense` is not of the type this class replaces.
        """
        if not isinstance(dense, cls.dense_type) or isinstance(dense, MaskedModule):
            raise TypeError(
                f"dense must be a {cls.dense_type.__name__}, but is a {type(dense).__name__}"
            )
        layer = retyped(dense, cls)
        layer._init_masking(granularity, reset_ratio, surrogate, structure_gradient, backend, path)
        return layer

    def to_dense(self) -> nn.Module:
        """The plain `torch.nn` module with weight * mask baked in; shares the biases.

        Raises RuntimeError where a weight is sharded.
        """
        parts = self.masked_weights()
        if any(is_dtensor(part.weight) for part in parts):
            raise RuntimeError(
                "a sharded layer cannot be made dense: gather the state dict and load it into an "
                "unsharded model first"
            )
        layer = retyped(self, self.dense_type)
        for name in OPTIONS:
            del layer.__dict__[name]
        for part in parts:
            del layer._parameters[part.threshold_name]
            baked = nn.Parameter(part.baked(), requires_grad=part.weight.requires_grad)
            layer._parameters[part.name] = baked
        return layer


def retyped(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A shallow copy of `module` as a `cls`, to take its place.

    Hooks are shared, so that a handle from before still removes its hook.
    """
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = module.__dict__[name].copy()
    return new


def _zeros(threshold: Tensor, weight: Tensor) -> Tensor:
    """Return zero thresholds for a checkpoint that has none."""
    if is_dtensor(threshold):
        return torch.zeros_like(threshold)
    dtype = torch.promote_types(threshold.dtype, weight.dtype)
    return torch.zeros_like(threshold, dtype=dtype, device=weight.device)


_last_missing_keys: list[str] | None = None


def _log_missing_once(missing_keys: list[str]) -> None:
    """One line per load_state_dict, however many layers: they all get the same list."""
    global _last_missing_keys
    if _last_missing_keys is not missing_keys:
        _last_missing_keys = missing_keys
        logger.warning("the state dict has no thresholds (a dense checkpoint?): they start at 0")
