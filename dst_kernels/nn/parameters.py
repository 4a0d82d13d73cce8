"""Mask any parameter of any module: `mask_parameter_`, and the mixin behind it.

The module keeps its forward. While that runs, reading the parameter gives W * M, computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .. import autograd
from ..arguments import require_module
from ..autograd import MaskOptions
from ..ops import is_watched
from .in_place import mask_module_, unmask_module_
from .module import MaskedModule
from .weight import OUT_IN, TRANSPOSED, MaskedWeight


class Layout(NamedTuple):
    """Say how the outputs are arranged in a parameter; see `MaskedWeight`."""

    matrices: int = 1
    experts: str = ""


class MaskedParameters(MaskedModule):
    """Mask some parameters of a module, as a mixin after its class.

    The threshold of `weight` is `threshold`, that of any other `name` is `threshold_<name>`.
    """

    dense_type = nn.Module
    accepted_paths = ("auto", "packed")
    _layouts: dict[str, Layout]

    def masked_weights(self) -> Sequence[MaskedWeight]:
        """Return every masked parameter."""
        return [
            MaskedWeight(self, name, threshold_name(name), *layout)
            for name, layout in self._layouts.items()
        ]

    def mask(self) -> dict[str, Tensor]:
        """Return a boolean mask by parameter name: True where kept; no synchronisation."""
        return {part.name: part.mask() for part in self.masked_weights()}

    def _weight_to_compute_with(self, name: str, weight: Tensor) -> Tensor:
        part = MaskedWeight(self, name, threshold_name(name), *self._layouts[name])
        if name in self._fixed:
            return part.under_fixed_mask(weight)
        threshold = part.threshold_for(weight)
        rows, limits = part.rows(weight), part.rows(threshold)
        if (
            part.matrices > 1
            and type(weight) in (Tensor, Parameter)
            and not weight.is_meta
            and not is_watched()
            and not self._sharded_thresholds
            and limits.data_ptr() == threshold.data_ptr()  # a view: a reset reaches the threshold
        ):
            masked = autograd.mask_weights(
                [rows], [limits], [self.masking], [self._commits()], rows.dtype,
                matrices=[part.matrices],
                out=[torch.empty_like(rows, memory_format=torch.contiguous_format)],
            )[0]  # fmt: skip
            return part.back(masked, weight)
        pairs = zip(rows.chunk(part.matrices), limits.chunk(part.matrices), strict=True)
        made = [autograd.masked_weight(*pair, self.masking) for pair in pairs]
        if self._commits():
            effective = torch.cat([effective for _, effective in made])
            self._commit(threshold, part.back(effective, threshold), part.threshold_name)
        masked = made[0][0] if len(made) == 1 else torch.cat([matrix for matrix, _ in made])
        return part.back(masked, weight)


def threshold_name(name: str) -> str:
    """Return the attribute name of a parameter's threshold."""
    return "threshold" if name == "weight" else f"threshold_{name}"


def mask_parameters_(
    module: nn.Module, layouts: dict[str, Layout], options: MaskOptions
) -> MaskedParameters:
    """Mask these parameters of a dense module, in place; return it."""
    module.__dict__["_layouts"] = layouts
    try:
        masked = mask_module_(module, MaskedParameters, options, tuple(layouts))
        return cast(MaskedParameters, masked)
    except Exception:
        del module.__dict__["_layouts"]
        raise


def mask_parameter_(
    module: nn.Module, name: str, *, matrices: int = 1, experts: str = "", **options
) -> nn.Module:
    """Mask one parameter of any module, in place; return `module`.

    The module stays the same object and keeps its class's forward. While its forward runs, reading
    the attribute `name` gives weight * mask, made once, with gradients to the parameter and to its
    threshold: a new Parameter `threshold` for `weight`, else `threshold_<name>`, of zeros. At all
    other times it gives the parameter itself. Call it again for further parameters of the module:
    they share its options.

    Args:
        module: owns the parameter, and reads it in its own forward only.
        name: the name of a floating-point parameter of at least two dimensions.
        matrices: how many matrices are stacked in it along dimension 0 (the gates of a recurrent
            cell, or q, k and v); the collapse guard checks each by itself.
        experts: for a parameter of three dimensions with one matrix per expert, the order of the
            other two: "out, in" or "in, out". Each expert then has its own thresholds and guard.
            "": dimension 0 is the output, as in torch's layers.
        options: the keyword-only arguments of `MaskedLinear`.

    Raises:
        TypeError: `module` is no module, or the parameter's dtype is not one of float16, bfloat16,
            float32 and float64.
        ValueError: no such parameter, masked already, fewer than two dimensions, `matrices` that
            does not divide dimension 0, an unknown order of `experts`, an option out of range, or
            options for a module that has masked parameters already.
    """
    require_module(module, "module")
    known: dict[str, Layout] = {}
    if isinstance(module, MaskedParameters):
        known = module._layouts
    elif isinstance(module, MaskedModule):
        raise ValueError(f"module is a {type(module).__name__}, whose weights are masked already")
    weight = module._parameters.get(name)
    if weight is None:
        owned = ", ".join(module._parameters) or "none"
        raise ValueError(f"name must be that of a parameter ({owned}), but is {name!r}")
    if name in known:
        raise ValueError(f"name: {name!r} is masked already")
    if weight.dim() < 2:
        shape = list(weight.shape)
        raise ValueError(f"{name} must have at least 2 dimensions, but its shape is {shape}")
    if experts not in ("", OUT_IN, TRANSPOSED) or (experts and weight.dim() != 3):
        raise ValueError(
            f"experts must be 'out, in' or 'in, out' for a parameter of three dimensions, or '', "
            f"but is {experts!r} for one of shape {list(weight.shape)}"
        )
    if experts:
        matrices = weight.shape[0]
    if not isinstance(matrices, int) or matrices < 1 or weight.shape[0] % matrices:
        raise ValueError(
            f"matrices must divide the {weight.shape[0]} rows of {name}, but is {matrices!r}"
        )
    if known and options:
        raise ValueError("options are those of the parameters that are masked already: give none")
    if not known:
        return mask_parameters_(module, {name: Layout(matrices, experts)}, MaskOptions(**options))
    masked = cast(MaskedParameters, module)
    thresholds = {part.threshold_name: part.threshold for part in masked.masked_weights()}
    masking, fixed, buffers = masked.masking, masked._fixed, dict(masked._buffers)
    unmask_module_(masked)
    mask_parameters_(module, {**known, name: Layout(matrices, experts)}, masking)
    for each, threshold in thresholds.items():
        setattr(module, each, threshold)
    module.__dict__["_fixed"] = fixed
    module._buffers.update(buffers)
    return module
