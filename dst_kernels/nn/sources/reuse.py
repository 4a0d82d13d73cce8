"""Packing a layer's masked weight once for several forwards.

Only the user can know that weights stay as they are: writes through `.data` leave no trace, and
fused optimizers do not count their versions up. Hence a scope, opened by name; inside it every
change that can be seen still leads to a new pack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ... import autograd
from ...autograd.weight import Packed

__all__ = ["Packs", "packs_of", "weights_unchanged"]


class Packs:
    """One layer's masked copies by compute dtype, and what they were made from."""

    def __init__(self) -> None:
        self._made: dict[torch.dtype, tuple[tuple, Packed]] = {}
        self._sources: tuple[Tensor, Tensor] | None = None

    def clear(self) -> None:
        self._made.clear()
        self._sources = None

    def get(
        self,
        weight: Tensor,
        threshold: Tensor,
        reset_ratio: float | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Packed:
        """The copy in `dtype`, new where weight or threshold were seen to change."""
        # A tensor made in inference mode could not be saved for a backward outside it.
        inference = torch.is_inference_mode_enabled()
        state = _state(weight), _state(threshold), reset_ratio, backend, inference
        known = self._made.get(dtype)
        if known is not None and known[0] == state:
            return known[1]
        packed = autograd.pack(weight, threshold, reset_ratio, dtype, backend)
        # Held, so that other tensors cannot come to lie at the same addresses.
        self._sources = weight.detach(), threshold.detach()
        still_valid = {key: made for key, made in self._made.items() if made[0] == state}
        self._made = {**still_valid, dtype: (state, packed)}
        return packed

    def threshold_was_committed(self, threshold: Tensor) -> None:
        """What a commit writes is what the copies were made with.

        They may have been made with a view of it, which shares its version.
        """
        version = _version(threshold)
        self._made = {
            dtype: ((weight, (version, *place), *rest), packed)
            for dtype, ((weight, (_, *place), *rest), packed) in self._made.items()
        }


# By layer, while a scope is open. Not an attribute of the layer: copies of it would have it too.
_open: WeakKeyDictionary[nn.Module, Packs] = WeakKeyDictionary()


def packs_of(layer: nn.Module) -> Packs | None:
    """The copies of a layer in an open scope; None outside, and for what torch.func wraps."""
    if not _open or torch._C._are_functorch_transforms_active():
        return None
    return _open.get(layer)


def _state(tensor: Tensor) -> tuple:
    return _version(tensor), tensor.data_ptr(), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> object:
    # An inference tensor counts no versions and can be written to in inference mode only.
    return object() if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def weights_unchanged(model: nn.Module) -> Iterator[None]:
    """Promise that inside this scope the weights and thresholds of `model` stay as they are.

    Its masked layers then mask and cast each weight once, not once per forward: for the
    micro-batches of a gradient accumulation, or an evaluation. It costs one copy of each masked
    weight in the compute dtype while the scope is open. Results are those without the scope.

    Optimizer steps, `load_state_dict`, in-place operations and new tensors inside the scope are
    noticed and lead to new copies. Writes through `.data` or from outside PyTorch are not: leave
    the scope before them. Layers sharded by FSDP2, compiled ones and recurrent modules pack at
    every forward.
    """
    from ..layer import MaskedLayer

    layers = [module for module in model.modules() if isinstance(module, MaskedLayer)]
    # Layers of an outer scope go on with its copies.
    opened = {layer: Packs() for layer in layers if layer not in _open}
    _open.update(opened)

    def clear(*_) -> None:
        for packs in opened.values():
            packs.clear()

    hook = register_optimizer_step_post_hook(clear)
    try:
        yield
    finally:
        hook.remove()
        for layer in opened:
            _open.pop(layer, None)
