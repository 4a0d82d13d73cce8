"""What all masked modules share: options, thresholds, state dicts.

A module has one masked weight (`layer.py`) or several (`recurrent.py`). How a dense module becomes
a masked one, and back, is in `in_place.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..arguments import REAL, REAL_DTYPES, require, require_tensors
from ..autograd import MaskOptions, check_options
from ..backends import resolve
from ..ops.checks import check_effective_threshold
from ..ops.dtensor import is_dtensor, reset_rows
from ..plan import PATHS
from .in_place import mask_module_, shallow_copy, unmask_module_
from .weight import Fixed, MaskedWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


class MaskedModule(nn.Module):
    """Mixin that goes before a `torch.nn` module.

    Attributes:
        masking: the options, a `MaskOptions`; each can also be read and set by its own name.
        dense_type: the class of torch whose twin this is.
        dense_class: what the module becomes without masks: `dense_type`, or a subclass of it.
        accepted_paths: that its products can take.
        rows_first: whether weights are stored with one output after the other.
        own_reads: the weights that a forward of a user's subclass may read.
    """

    masking: MaskOptions
    dense_type: ClassVar[type[nn.Module]]
    dense_class: ClassVar[type[nn.Module]]
    accepted_paths: ClassVar[tuple[str, ...]] = PATHS
    rows_first: ClassVar[bool] = True
    own_reads: ClassVar[tuple[str, ...]] = ()
    _own_reads: ClassVar[frozenset[str]] = frozenset()

    _parameters: dict[str, Any]  # a Parameter, or None
    _buffers: dict[str, Any]
    # By name, thresholds that FSDP2 keeps sharded, and weights under a fixed mask. Replaced, never
    # written to; an empty MappingProxyType would be true to the compiler.
    _sharded_thresholds: Mapping[str, DTensor] = {}
    _fixed: Mapping[str, Fixed] = {}

    def __init__(
        self,
        *args,
        granularity: str = "row",
        reset_ratio: float | None = 0.01,
        surrogate: str = "long_tailed",
        structure_gradient: bool = True,
        backend: str = "auto",
        path: str = "auto",
        **kwargs,
    ) -> None:
        for dtype in (kwargs.get("dtype"), *args):
            if isinstance(dtype, torch.dtype):
                require(dtype in REAL_DTYPES, "dtype", REAL, dtype)
        super().__init__(*args, **kwargs)
        options = granularity, reset_ratio, surrogate, structure_gradient, backend, path
        self._init_masking(MaskOptions(*options))

    def __init_subclass__(cls, **kwargs) -> None:
        """Give every twin of a torch class a constructor with the signature of both."""
        super().__init_subclass__(**kwargs)
        if "dense_type" not in cls.__dict__:
            return
        cls.dense_class = cls.dense_type

        def __init__(self, *args, **kwargs) -> None:
            super(cls, self).__init__(*args, **kwargs)

        options = inspect.signature(MaskedModule.__init__).parameters.values()
        parents = inspect.signature(cls.dense_type.__init__).parameters.values()
        both = [
            *(p for p in parents if p.kind is not p.VAR_KEYWORD),
            *(p for p in options if p.kind is p.KEYWORD_ONLY),
            *(p for p in parents if p.kind is p.VAR_KEYWORD),
        ]
        vars(__init__)["__signature__"] = inspect.Signature(both)
        setattr(cls, "__init__", __init__)  # noqa: B010 - a type checker refuses the assignment

    def masked_weights(self) -> Sequence[MaskedWeight]:
        """Return every weight that is masked."""
        raise NotImplementedError

    def _init_masking(self, options: MaskOptions) -> None:
        """Set the options, and thresholds of 0; raises what a masked layer's constructor does."""
        check_options(options, self.accepted_paths)
        resolve(options.backend)
        thresholds = [self._new_threshold(part, options) for part in self.masked_weights()]
        self.__dict__["masking"] = options
        for part, threshold in zip(self.masked_weights(), thresholds, strict=True):
            setattr(self, part.threshold_name, threshold)

    def _new_threshold(self, part: MaskedWeight, options: MaskOptions) -> nn.Parameter:
        weight = part.weight
        require_tensors(**{part.name: weight})
        rows = part.rows(weight)
        shape = {
            "row": weight.shape[:1] + rows.view(part.matrices, -1, *rows.shape[1:]).shape[1:2]
            if part.experts
            else rows.shape[:1],
            "layer": [part.matrices],  # never 0-dim: FSDP2 shards no scalars
            "element": weight.shape,
        }[options.granularity]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(shape, dtype=dtype, device=weight.device)
        threshold = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        one = rows.chunk(part.matrices)[0], part.rows(threshold).chunk(part.matrices)[0]
        check_effective_threshold(*one, options.reset_ratio)
        return threshold

    def reset_parameters(self) -> None:
        """Weights and biases as the parent does, thresholds to 0."""
        of_parent = getattr(super(), "reset_parameters", None)
        if of_parent is not None:
            of_parent()
        if "masking" in self.__dict__:  # the parent's __init__ calls this before there are any
            MaskedModule.reset_threshold(self)

    @torch.no_grad()
    def reset_threshold(self, value: float = 0.0) -> None:
        """Set every threshold to `value`; at 0 all weights but exact zeros are kept."""
        require(isinstance(value, Real), "value", "a number", value)
        for part in self.masked_weights():
            part.threshold.fill_(value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._masking_repr()}"

    def _masking_repr(self) -> str:
        options = self.masking._asdict()
        if self._fixed:
            options["fixed"] = "+".join(self._fixed)
        return ", ".join(f"{name}={value}" for name, value in options.items())

    def _rows(self, tensor: Tensor) -> Tensor:
        """Weight-shaped tensors with output rows first; layers that store them otherwise override.

        Must be its own inverse and leave tensors of one dimension alone.
        """
        return tensor

    # -- the collapse guard --------------------------------------------------------------------

    def _commits(self) -> bool:
        """Whether a forward now writes resets by the guard into the thresholds.

        Not in forward-mode AD: torch.func.linearize would record the write and repeat it.
        """
        return (
            self.training and self.masking.reset_ratio is not None and forward_ad._current_level < 0
        )

    @torch.no_grad()
    def _commit(self, threshold: Tensor, effective: Tensor, name: str = "threshold") -> None:
        shard = self._sharded_thresholds.get(name)
        if shard is not None:
            reset_rows(shard, (effective == 0) & (threshold != 0))
        try:
            threshold.copy_(effective)
        except RuntimeError:
            # torch.func lets a function write to nothing but what it is given: then the reset is
            # written by the next forward outside. Outputs are the same.
            if not torch._C._are_functorch_transforms_active():
                raise

    # -- torch.nn.Module machinery -------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return an option, where neither the module nor the user's class has that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in MaskOptions._fields or "masking" not in self.__dict__:
                raise
        return getattr(self.masking, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option of one of our own layers; everything else as torch does."""
        ours = name in MaskOptions._fields and self.dense_class is self.dense_type
        if ours and "masking" in self.__dict__ and name not in self.__dict__:
            options = self.masking._replace(**{name: value})
            check_options(options, self.accepted_paths)
            name, value = "masking", options
        # During forward FSDP2 puts a gathered copy in the parameter's place and drops it after;
        # a committed reset must also reach the shard, which is seen when FSDP2 sets it here.
        if isinstance(value, Tensor) and is_dtensor(value) and name.startswith("threshold"):
            self.__dict__["_sharded_thresholds"] = {**self._sharded_thresholds, name: value}
        super().__setattr__(name, value)
        if name == "_is_hf_initialized" and value:
            self._zero_uninitialized()

    @torch.no_grad()
    def _zero_uninitialized(self) -> None:
        """Zero thresholds that transformers' `from_pretrained` has made, but not loaded.

        It marks the parameters that it has loaded or initialised, and then the module.
        """
        for part in self.masked_weights():
            if not getattr(part.threshold, "_is_hf_initialized", False):
                part.threshold.zero_()

    def __getstate__(self) -> dict:
        """Return what a copy has: it belongs to no optimizer, and its parameters are its own."""
        left = ("_deferral", "_sharded_thresholds")
        # Python 3.10 has no `object.__getstate__`.
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return {name: value for name, value in state.items() if name not in left}

    def _apply(self, fn, recurse: bool = True):
        """Conversions move thresholds, but never below float32: their updates would round away.

        Fixed masks stay boolean.

        A threshold without memory beside a weight that has some belongs to a dense checkpoint that
        was loaded weight by weight: it becomes 0.
        """
        for part in self.masked_weights():
            if part.threshold.is_meta and not part.weight.is_meta:
                zeros = torch.zeros_like(part.threshold, device=part.weight.device)
                self._parameters[part.threshold_name] = nn.Parameter(zeros)
        thresholds = [part.threshold for part in self.masked_weights()]
        kept = [t for t in (*thresholds, *(t.grad for t in thresholds)) if t is not None]
        masks = [part.fixed_mask for part in self.masked_weights()]

        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if any(tensor is each for each in masks):
                return converted.to(torch.bool)
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
        """A dense checkpoint has no thresholds: they start at 0, which keeps every weight.

        One with fixed masks fixes those of the module. Where one without meets a fixed mask, its
        key is missing: an error by torch, or with strict=False the mask stays.
        """
        found = {}
        for part in self.masked_weights():
            key = prefix + part.threshold_name
            threshold, weight = state_dict.get(key), state_dict.get(prefix + part.name)
            if threshold is not None:
                found[key] = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
            elif weight is not None:
                found[key] = _zeros(part.threshold, weight)
                _log_once(missing_keys, _NO_THRESHOLDS)
            key = prefix + part.fixed_mask_name
            mask = state_dict.get(key)
            if mask is not None and mask.shape == part.weight.shape:
                if not hasattr(self, part.fixed_mask_name):  # nor a user's own
                    part.set_fixed_mask(torch.ones_like(part.weight, dtype=torch.bool))
                if part.fixed_mask is not None:
                    found[key] = mask.to(torch.bool)
            elif mask is None and weight is not None and part.fixed_mask is not None:
                _log_once(missing_keys, _NO_FIXED_MASKS)
        super()._load_from_state_dict(
            {**state_dict, **found} if found else state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    # -- dense and back: see in_place.py -------------------------------------------------------

    @classmethod
    def from_dense(cls, dense: nn.Module, **options: Any) -> MaskedModule:
        """Return a masked module with the same Parameters, mode, hooks and attributes.

        `options` are the keyword-only arguments of the constructor; thresholds start at 0. `dense`
        stays as it is; `dst_kernels.sparsify_` changes modules in place.

        Raises TypeError where `dense` is not of the type this class replaces, and what the
        constructor raises.
        """
        if not isinstance(dense, cls.dense_type) or isinstance(dense, MaskedModule):
            raise TypeError(
                f"dense must be a {cls.dense_type.__name__}, but is a {type(dense).__name__}"
            )
        return mask_module_(shallow_copy(dense), cls, MaskOptions(**options))

    def to_dense(self) -> nn.Module:
        """Return the dense module with weight * mask baked in; it shares the biases.

        Raises RuntimeError where a weight is sharded or computed by a parametrization.
        """
        layer = shallow_copy(self)
        for part in self.masked_weights():
            if part.name in layer._parameters and not is_dtensor(part.weight):
                baked = nn.Parameter(part.baked(), requires_grad=part.weight.requires_grad)
                layer._parameters[part.name] = baked
        return unmask_module_(layer)


def _zeros(threshold: Tensor, weight: Tensor) -> Tensor:
    """Return zero thresholds for a checkpoint that has none."""
    if is_dtensor(threshold):
        return torch.zeros_like(threshold)
    dtype = torch.promote_types(threshold.dtype, weight.dtype)
    return torch.zeros_like(threshold, dtype=dtype, device=weight.device)


_NO_THRESHOLDS = "the state dict has no thresholds (a dense checkpoint?): they start at 0"
_NO_FIXED_MASKS = (
    "the state dict has no masks for layers whose masks are fixed: these stay (with strict=False). "
    "Call dst_kernels.unfreeze_masks_ first to load a model without fixed masks"
)
_logged: dict[str, list[str]] = {}


def _log_once(missing_keys: list[str], line: str) -> None:
    """One line per load_state_dict, however many layers: they all get the same list."""
    if _logged.get(line) is not missing_keys:
        _logged[line] = missing_keys
        logger.warning(line)
