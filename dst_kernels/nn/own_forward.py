"""Masking what a forward of the user's own reads: `self.weight` is W * M while it runs.

A subclass of a torch layer may compute with `self.weight` in a forward of its own, standardise it
first, or hand it to a function. There the masked weight takes the place of the attribute for as
long as a call of the layer runs on this thread. At all other times reading the attribute gives the
Parameter, so that initialisers, tying and merges find it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .module import MaskedModule

__all__ = ["OwnForward", "has_forward_of_its_own"]

_METHODS = ("forward", "_conv_forward", "_output_padding")


def has_forward_of_its_own(dense: type[nn.Module], masked: type[MaskedModule]) -> bool:
    """Whether a class with one weight computes with methods that are not torch's."""
    torchs = masked.dense_type
    return hasattr(masked, "_weight_to_compute_with") and any(
        getattr(dense, m, None) is not getattr(torchs, m, None) for m in _METHODS
    )


class _Running(threading.local):
    """By layer whose call runs on this thread: its masked weight, once that was read."""

    def __init__(self) -> None:
        self.masked: dict[nn.Module, Tensor | None] = {}


_running = _Running()


class OwnForward:
    """Mixin that goes before a user's class with a forward of its own."""

    def __call__(self, *args, **kwargs):
        if "parametrizations" in self._modules:  # its property would hide ours
            raise RuntimeError(
                f"{type(self).__name__} has a forward of its own and a parametrized weight, which "
                "would not be masked: remove it, or call dst_kernels.densify_ first"
            )
        if torch.compiler.is_compiling() or self in _running.masked:
            return super().__call__(*args, **kwargs)
        _running.masked[self] = None
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del _running.masked[self]

    @property
    def weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.__dict__.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        if torch.compiler.is_compiling():  # compiled code reads weights to compute with them
            return self._weight_to_compute_with(weight)
        if self not in _running.masked:
            return weight
        masked = _running.masked[self]
        if masked is None:
            masked = _running.masked[self] = self._weight_to_compute_with(weight)
        return masked

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value
