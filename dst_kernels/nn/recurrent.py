"""Masked recurrent modules, LSTM, GRU and plain RNN: gate matrices masked once per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import autograd
from ..ops import is_watched
from ..ops.autocast import autocast_enabled
from .cudnn_buffer import cudnn_takes, empty_parameters
from .in_place import shallow_copy
from .module import MaskedModule
from .weight import MaskedWeight

RECURRENT_PATHS = ("auto", "packed")  # products are torch's: cuDNN's on a GPU

_GATES = {"LSTM": 4, "GRU": 3}  # matrices stacked in weight_ih and weight_hh
_CAST_BY_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


class MaskedRecurrent(MaskedModule):
    """`torch.nn.{parent}` that computes with the weights whose magnitude exceeds their threshold.

    Arguments, input and output as in the parent, and keyword-only arguments and errors as in
    `MaskedLinear`, but that `path` is "auto" or "packed", which are the same here. `weight_ih_l0`
    has `threshold_ih_l0`, and so on. Every gate matrix is masked by itself: a row is one unit of
    one gate, "layer" means one threshold for each gate of each weight, and the collapse guard
    looks at each gate's matrix. Biases are dense.

    Weights are masked once per call, not per time step, straight to where cuDNN wants them. All
    layers and directions are masked in one launch, also outside of `dst_kernels.group_`.
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
        """By weight: boolean, True where a weight is kept; no synchronisation."""
        return {part.name: part.mask() for part in self.masked_weights()}

    @torch.no_grad()
    def remaining_ratio(self) -> Tensor:
        """Kept weights / all weights, a 0-dim float32 tensor on the module's device."""
        masks = self.mask().values()
        kept = torch.stack([mask.sum() for mask in masks]).sum()
        return kept.to(torch.float32) / sum(mask.numel() for mask in masks)

    # -- forward -------------------------------------------------------------------------------

    # torch's compiler leaves recurrent modules to eager mode, too, unless told otherwise.
    @torch._disable_dynamo
    def forward(self, input, hx=None):
        # The parent's forward computes with the `_flat_weights` of a module: of one that lives for
        # this call, so that no other call, on another thread, meets these masked weights.
        other = shallow_copy(self)
        other.__dict__["_flat_weights"] = self._masked_parameters()
        return super(MaskedRecurrent, other).forward(input, hx)

    def _masked_parameters(self) -> list[Tensor]:
        """W * M of every weight, and the biases, in the dtype of the products."""
        parameters = [getattr(self, name) for name in self._flat_weights_names]
        parts = {part.name: part for part in self.masked_weights()}
        dtype = _product_dtype(parameters[0])
        at_once = _is_plain(parameters) and not self._sharded_thresholds
        mask = self._mask_at_once if at_once else self._mask_one_by_one
        weights, biases = map(iter, mask(parts.values(), parameters, dtype))
        return [next(weights if name in parts else biases) for name in self._flat_weights_names]

    def _mask_at_once(
        self, parts: Iterable[MaskedWeight], parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weights = [part.weight for part in parts]
        shapes = [parameter.shape for parameter in parameters]
        out = empty_parameters(self, shapes, dtype, parameters[0].device)
        made = autograd.mask_weights(
            weights,
            [part.threshold for part in parts],
            [self.masking] * len(weights),
            [self._commits()] * len(weights),
            dtype,
            matrices=[part.matrices for part in parts],
            out=[each for each in out if each.dim() == 2],
            copied=_biases(parameters),
            copies=_biases(out),
        )
        return made[: len(weights)], made[len(weights) :]

    def _mask_one_by_one(
        self, parts: Iterable[MaskedWeight], parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """With registered ops, as fake tensors, dispatch modes, torch.func and FSDP2 want it."""
        masked = []
        for part in parts:
            weights, thresholds = (t.chunk(part.matrices) for t in (part.weight, part.threshold))
            made = [
                autograd.masked_weight(weight, threshold, self.masking, dtype)
                for weight, threshold in zip(weights, thresholds, strict=True)
            ]
            masked.append(torch.cat([matrix for matrix, _ in made]))
            if self._commits():
                effective = torch.cat([effective for _, effective in made])
                self._commit(part.threshold, effective, part.threshold_name)
        return masked, [bias.to(dtype) for bias in _biases(parameters)]

    # -- torch.nn.RNNBase machinery ------------------------------------------------------------

    def flatten_parameters(self) -> None:
        """Nothing to do: masked weights are flat, and the parameters are not computed with."""

    def _update_flat_weights(self) -> None:
        """Nothing to do: forward reads the parameters, whatever they are by then."""

    def __getstate__(self) -> dict:
        parameters = [self._parameters.get(name) for name in self._flat_weights_names]
        return {**super().__getstate__(), "_flat_weights": parameters}


def _biases(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.dim() == 1]


def _is_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether nothing but eager torch sees these, so that ops without a fake can run on them."""
    return not (
        is_watched()
        or any(type(each) not in (Tensor, nn.Parameter) for each in parameters)
        or parameters[0].device.type not in ("cpu", "cuda")
    )


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What the parent's products run in: under autocast its dtype, else the weight's."""
    device = weight.device
    if not autocast_enabled(device.type) or weight.dtype not in _CAST_BY_AUTOCAST:
        return weight.dtype
    # torch's autocast knows only float16 for cuDNN's recurrent layers, whatever was asked for.
    if cudnn_takes(torch.float16, device):
        return torch.float16
    return torch.get_autocast_dtype(device.type)


class MaskedLSTM(MaskedRecurrent, nn.LSTM):
    __doc__ = MaskedRecurrent.__doc__.format(parent="LSTM")
    dense_type = nn.LSTM


class MaskedGRU(MaskedRecurrent, nn.GRU):
    __doc__ = MaskedRecurrent.__doc__.format(parent="GRU")
    dense_type = nn.GRU


class MaskedRNN(MaskedRecurrent, nn.RNN):
    __doc__ = MaskedRecurrent.__doc__.format(parent="RNN")
    dense_type = nn.RNN
