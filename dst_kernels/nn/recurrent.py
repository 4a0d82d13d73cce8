"""Mask recurrent modules (LSTM, GRU, plain RNN): every gate matrix once per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from .. import autograd
from ..ops import is_exporting, is_watched
from ..ops.autocast import autocast_enabled
from .cudnn_buffer import cudnn_takes, empty_parameters
from .in_place import shallow_copy
from .module import MaskedModule
from .tools import recorded, refuse_training
from .weight import MaskedWeight

RECURRENT_PATHS = ("auto", "packed")  # the products are torch's: cuDNN's on a GPU

_GATES = {"LSTM": 4, "GRU": 3}  # matrices stacked in weight_ih and weight_hh
_CAST_BY_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


class MaskedRecurrent(MaskedModule, nn.RNNBase):
    """Run `torch.nn.{parent}` with only the weights whose magnitude exceeds their threshold.

    Arguments, input and output are those of the parent; keyword-only arguments and errors those of
    `MaskedLinear`, but `path` is "auto" or "packed", which are the same here. `weight_ih_l0` has
    `threshold_ih_l0`, and so on. As in the paper, every gate's matrix is its own layer: a row is
    one unit of one gate, "layer" means one threshold for each gate of each weight, and the collapse
    guard checks each gate's matrix. Biases are dense.

    Weights are masked once per call, not per time step, directly into the buffer that cuDNN uses.
    All layers and directions are masked in one launch, also without `dst_kernels.group_`.
    """

    accepted_paths = RECURRENT_PATHS

    def masked_weights(self) -> Sequence[MaskedWeight]:
        gates = _GATES.get(self.mode, 1)
        return [
            MaskedWeight(
                self, name, name.replace("weight", "threshold"), 1 if "_hr_" in name else gates
            )
            for name in self._flat_weights_names
            if name.startswith("weight")
        ]

    def mask(self) -> dict[str, Tensor]:
        """Return a boolean mask by weight name, True where a weight is kept; no synchronisation."""
        return {part.name: part.mask() for part in self.masked_weights()}

    @torch.no_grad()
    def remaining_ratio(self) -> Tensor:
        """Return kept weights / all weights, a 0-dim float32 tensor on the module's device."""
        masks = self.mask().values()
        kept = torch.stack([mask.sum() for mask in masks]).sum()
        return kept.to(torch.float32) / sum(mask.numel() for mask in masks)

    # -- forward -------------------------------------------------------------------------------

    # By default torch.compile runs torch's own recurrent modules eagerly, too.
    @torch._disable_dynamo
    def forward(self, input: Any, hx: Any = None) -> Any:
        # The parent's forward computes with the module's `_flat_weights`. A copy that lives for
        # this call holds the masked ones, so that calls on other threads do not see them.
        other = shallow_copy(self)
        other.__dict__["_flat_weights"] = self._masked_parameters()
        return super(MaskedRecurrent, other).forward(input, hx)

    def _masked_parameters(self) -> list[Tensor]:
        """Return W * M of every weight, and the biases, in the dtype of the products."""
        parameters = [getattr(self, name) for name in self._flat_weights_names]
        parts = {part.name: part for part in self.masked_weights()}
        if self._fixed:  # these are masked here; below they count as dense, as biases do
            for i, name in enumerate(self._flat_weights_names):
                if name in self._fixed:
                    parameters[i] = parts.pop(name).under_fixed_mask(parameters[i])
        dtype = _product_dtype(parameters[0])
        is_masked = [name in parts for name in self._flat_weights_names]
        at_once = _is_plain(parameters) and not self._sharded_thresholds
        mask = self._mask_at_once if at_once else self._mask_one_by_one
        masked, dense = mask([*parts.values()], parameters, is_masked, dtype)
        weights, others = iter(masked), iter(dense)
        return [next(weights if each else others) for each in is_masked]

    def _mask_at_once(
        self,
        parts: Sequence[MaskedWeight],
        parameters: Sequence[Tensor],
        is_masked: Sequence[bool],
        dtype: torch.dtype,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weights = [*compress(parameters, is_masked)]
        is_dense = [not each for each in is_masked]
        pairs = zip(parts, weights, strict=True)
        shapes = [parameter.shape for parameter in parameters]
        out = empty_parameters(self, shapes, dtype, parameters[0].device)
        made = autograd.mask_weights(
            weights,
            [part.threshold_for(weight) for part, weight in pairs],
            [self.masking] * len(weights),
            [self._commits()] * len(weights),
            dtype,
            matrices=[part.matrices for part in parts],
            out=[*compress(out, is_masked)],
            copied=[*compress(parameters, is_dense)],
            copies=[*compress(out, is_dense)],
        )
        return made[: len(weights)], made[len(weights) :]

    def _mask_one_by_one(
        self,
        parts: Sequence[MaskedWeight],
        parameters: Sequence[Tensor],
        is_masked: Sequence[bool],
        dtype: torch.dtype,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Mask with registered ops, as fake tensors, dispatch modes, torch.func and FSDP2 need."""
        masked = []
        if is_exporting():
            refuse_training(self)
        for part in parts:
            if torch._C._get_tracing_state() is not None:
                masked.append(recorded(part).to(dtype))
                continue
            weight = part.weight
            pair = weight, part.threshold_for(weight)
            weights, thresholds = (t.chunk(part.matrices) for t in pair)
            made = [
                autograd.masked_weight(weight, threshold, self.masking, dtype)
                for weight, threshold in zip(weights, thresholds, strict=True)
            ]
            masked.append(torch.cat([matrix for matrix, _ in made]))
            if self._commits():
                effective = torch.cat([effective for _, effective in made])
                self._commit(part.threshold, effective, part.threshold_name)
        dense = zip(parameters, is_masked, strict=True)
        return masked, [each.to(dtype) for each, to_mask in dense if not to_mask]

    # -- torch.nn.RNNBase machinery ------------------------------------------------------------

    def flatten_parameters(self) -> None:
        """Do nothing: the masked weights are flat, and no product reads the parameters."""

    def _update_flat_weights(self) -> None:
        """Do nothing: every forward reads the current parameters."""

    def __getstate__(self) -> dict[str, Any]:
        parameters = [self._parameters.get(name) for name in self._flat_weights_names]
        return {**super().__getstate__(), "_flat_weights": parameters}


def _is_plain(parameters: Sequence[Tensor]) -> bool:
    """Return whether only eager torch sees these, so that ops without a fake can take them."""
    return not (
        is_watched()
        or any(type(each) not in (Tensor, nn.Parameter) for each in parameters)
        or parameters[0].is_meta
    )


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the parent's products: under autocast its dtype, else the weight's."""
    device = weight.device
    if not autocast_enabled(device.type) or weight.dtype not in _CAST_BY_AUTOCAST:
        return weight.dtype
    # For cuDNN's recurrent layers torch's autocast always takes float16.
    if cudnn_takes(torch.float16, device):
        return torch.float16
    return torch.get_autocast_dtype(device.type)


_DOC = MaskedRecurrent.__doc__ or ""  # python -OO drops docstrings


class MaskedLSTM(MaskedRecurrent, nn.LSTM):
    __doc__ = _DOC.format(parent="LSTM")
    dense_type = nn.LSTM


class MaskedGRU(MaskedRecurrent, nn.GRU):
    __doc__ = _DOC.format(parent="GRU")
    dense_type = nn.GRU


class MaskedRNN(MaskedRecurrent, nn.RNN):
    __doc__ = _DOC.format(parent="RNN")
    dense_type = nn.RNN
