"""Record what a masked weight was made from, to tell whether it is stale.

A stamp changes with other Parameters, in-place writes, new memory, other strides and another reset
ratio. PyTorch does not record a write through `.data` to the same memory: for that reason nothing
is reused in evaluation, and optimizers have `refresh`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..layer import MaskedLayer


def tensor_stamp(tensor: Tensor) -> tuple[object, int, int]:
    """Return identity, version and address: the same until PyTorch records a write."""
    try:
        return id(tensor), tensor._version, tensor.data_ptr()
    except RuntimeError:
        # An inference tensor has no version counter, so its stamp never equals another one.
        return object(), 0, 0


def stamp(layer: MaskedLayer) -> tuple | None:
    """Return the same value for calls with the same W * M; None for a computed weight.

    If you keep a stamp beyond a forward, also keep the memory (`memory_of`), so that no other
    tensor gets the same address.
    """
    own = layer._parameters
    weight, threshold = own.get("weight"), own.get("threshold")
    if weight is None or threshold is None:
        return None
    try:
        return (
            weight._version, threshold._version,
            id(weight), weight.data_ptr(), weight.stride(),
            id(threshold), threshold.data_ptr(), layer.masking.reset_ratio,
        )  # fmt: skip
    except RuntimeError:  # an inference tensor, as in `tensor_stamp`
        return (object(),)


def stamp_after_writes(before: tuple, layer: MaskedLayer) -> tuple:
    """Return the stamp of now, if values are all that has changed since the stamp `before`."""
    weight, threshold = layer._parameters["weight"], layer._parameters["threshold"]
    return weight._version, threshold._version, *before[2:]


def memory_of(layer: MaskedLayer) -> tuple[Tensor, Tensor]:
    """Return tensors that keep the memory of weight and threshold alive."""
    return layer._parameters["weight"].detach(), layer._parameters["threshold"].detach()
