"""Masking what a forward of the user's own reads: `self.weight` is W * M while it runs.

A subclass of a torch layer may compute with `self.weight` in a forward of its own, standardise it
first, or hand it to a function. There the masked weight takes the place of the attribute for as
long as the forward runs on this thread. At all other times reading the attribute gives the
Parameter, so that initialisers, hooks, tying and merges find it.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .module import MaskedModule

_METHODS = ("forward", "_conv_forward", "_output_padding")


def members_for_own_forward(dense: type[nn.Module], masked: type[MaskedModule]) -> dict[str, Any]:
    """Return what the class of a masked `dense` needs if it computes in a way that is not torch's.

    That is a property `weight` and a forward that switches it; nothing for other classes.
    """
    torchs = masked.dense_type
    if not hasattr(masked, "_weight_to_compute_with"):  # a recurrent module
        return {}
    if all(getattr(dense, m, None) is getattr(torchs, m, None) for m in _METHODS):
        return {}

    @functools.wraps(dense.forward)
    def forward(self, *args, **kwargs):
        if "parametrizations" in self._modules:  # its property hides ours
            raise RuntimeError(
                f"{type(self).__name__} has a forward of its own and a parametrized weight, which "
                "would not be masked: remove the parametrization or call dst_kernels.densify_"
            )
        if torch.compiler.is_compiling() or self in _running.masked:
            return dense.forward(self, *args, **kwargs)
        _running.masked[self] = None
        try:
            output = dense.forward(self, *args, **kwargs)
            _check_unwritten(self, _running.masked[self])
        finally:
            del _running.masked[self]
        return output

    return {"forward": forward, "weight": property(_weight, _set_weight)}


class _Running(threading.local):
    """By layer whose forward runs on this thread: W * M and its version, once it was read."""

    def __init__(self) -> None:
        self.masked: dict[nn.Module, tuple[Tensor, int] | None] = {}


_running = _Running()


def _weight(self) -> Tensor:
    weight = self._parameters.get("weight", self.__dict__.get("weight"))
    if weight is None:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
    if torch.compiler.is_compiling():  # compiled code reads weights to compute with them
        return self._weight_to_compute_with(weight)
    if self not in _running.masked:
        return weight
    if _running.masked[self] is None:
        masked = self._weight_to_compute_with(weight)
        _running.masked[self] = masked, 0 if masked.is_inference() else masked._version
    return _running.masked[self][0]


def _set_weight(self, value: Tensor) -> None:
    self.__dict__["weight"] = value


def _check_unwritten(self, read: tuple[Tensor, int] | None) -> None:
    if read is not None and not read[0].is_inference() and read[0]._version != read[1]:
        raise RuntimeError(
            f"the forward of {type(self).__name__} writes to its weight, which is the masked one "
            "there, so the write is lost: write before the forward, or keep the layer dense "
            "(filter_fn)"
        )
