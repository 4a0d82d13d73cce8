"""Implement what all masked modules share: options, thresholds, state dicts.

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
from .tools import LEAF, answer, refuse_quantizing, refuse_scripting
from .weight import Fixed, MaskedWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


class MaskedModule(nn.Module):
    """Mask weights of a `torch.nn` module, as a mixin before its class.

    Attributes:
        masking: the options, a `MaskOptions`; each can also be read and set by its own name.
        dense_type: the torch class whose masked twin this is.
        dense_class: the module's class without masks: `dense_type`, or a subclass of it.
        accepted_paths: the values that the option `path` may have.
        rows_first: whether dimension 0 of the stored weights is the output.
        own_reads: the weights that the forward of a user's subclass may read.
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
        """Set the options, and thresholds of 0; raise what a masked layer's constructor does."""
        check_options(options, self.accepted_paths)
        resolve(options.backend)
        thresholds = [self._new_threshold(part, options) for part in self.masked_weights()]
        self.__dict__.update(LEAF, masking=options)
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
        """Initialise weights and biases as the parent does, and set thresholds to 0."""
        of_parent = getattr(super(), "reset_parameters", None)
        if of_parent is not None:
            of_parent()
        if "masking" in self.__dict__:  # the parent's __init__ calls this before thresholds exist
            MaskedModule.reset_threshold(self)

    @torch.no_grad()
    def reset_threshold(self, value: float = 0.0) -> None:
        """Set every threshold to the number `value`; 0 keeps all weights except exact zeros."""
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
        """Return a weight-shaped tensor with output rows first, or turn it back.

        Layers that store weights otherwise override this. It must be its own inverse and leave
        tensors of one dimension unchanged.
        """
        return tensor

    # -- the collapse guard --------------------------------------------------------------------

    def _commits(self) -> bool:
        """Return whether a forward now writes resets by the guard into the thresholds.

        In forward-mode AD it does not: torch.func.linearize would record the write and repeat it.
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
            # Under torch.func a function may write to its arguments only. Then the next forward
            # outside of it writes the reset. Outputs are the same.
            if not torch._C._are_functorch_transforms_active():
                raise

    # -- torch.nn.Module machinery -------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return an option, unless the module or the user's class has an attribute of its name.

        Or what a tool asks for; see `tools.py`.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "masking" not in self.__dict__:
                raise
            if name not in MaskOptions._fields:
                found = answer(self, name)
                if found is None:
                    raise
                return found
        return getattr(self.masking, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option of one of our own layers; set everything else as torch does."""
        ours = name in MaskOptions._fields and self.dense_class is self.dense_type
        if ours and "masking" in self.__dict__ and name not in self.__dict__:
            options = self.masking._replace(**{name: value})
            check_options(options, self.accepted_paths)
            name, value = "masking", options
        # During a forward FSDP2 puts a gathered copy in the parameter's place and drops it after;
        # a committed reset must also reach the shard, so remember the shard when FSDP2 sets it.
        if isinstance(value, Tensor) and is_dtensor(value) and name.startswith("threshold"):
            self.__dict__["_sharded_thresholds"] = {**self._sharded_thresholds, name: value}
        super().__setattr__(name, value)
        if name == "_is_hf_initialized" and value:
            self._zero_uninitialized()

    # Tools that ask for these, and nobody else; see `tools.py`.
    __prepare_scriptable__ = refuse_scripting

    @property
    def qconfig(self) -> None:
        """Raise AttributeError: there is none, and setting one is refused."""
        raise AttributeError("a masked module has no qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        refuse_quantizing(self, value)

    @torch.no_grad()
    def _zero_uninitialized(self) -> None:
        """Set thresholds to 0 that transformers' `from_pretrained` has made, but not loaded.

        That function marks the parameters that it has loaded or initialised, then the module.
        """
        for part in self.masked_weights():
            if not getattr(part.threshold, "_is_hf_initialized", False):
                part.threshold.zero_()

    def __getstate__(self) -> dict:
        """Return the state of a copy, which belongs to no optimizer and has its own parameters."""
        left = ("_deferral", "_known_mask", "_prepared", "_sharded_thresholds", "_taker")
        # Python 3.10 has no `object.__getstate__`.
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return {name: value for name, value in state.items() if name not in left}

    def _apply(self, fn, recurse: bool = True):
        """Convert the module, but keep thresholds in at least float32 and fixed masks boolean.

        In 16 bits the small updates of a threshold would round away. A meta threshold beside a
        weight in memory comes from a dense checkpoint, loaded weight by weight: it becomes 0.
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
        """Load a state dict; thresholds that a dense checkpoint lacks become 0: all is kept.

        Fixed masks in it fix those of the module. If it lacks one that the module has, its key is
        missing: torch raises an error, or with strict=False the mask stays.
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
                if not hasattr(self, part.fixed_mask_name):  # a user's own attribute is left alone
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

        Raises TypeError if `dense` is no `dense_type` or is masked already, and what the
        constructor raises.
        """
        if not isinstance(dense, cls.dense_type) or isinstance(dense, MaskedModule):
            raise TypeError(
                f"dense must be a {cls.dense_type.__name__}, but is a {type(dense).__name__}"
            )
        return mask_module_(shallow_copy(dense), cls, MaskOptions(**options))

    def to_dense(self) -> nn.Module:
        """Return a dense module with weight * mask as its weight; it shares the biases.

        Raises RuntimeError if a weight is sharded or computed by a parametrization.
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
    """Log a line once per load_state_dict: all layers of one call get the same list."""
    if _logged.get(line) is not missing_keys:
        _logged[line] = missing_keys
        logger.warning(line)
