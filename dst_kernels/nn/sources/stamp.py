"""What a masked weight was made from, and with that whether it is stale.

Stamps see other Parameters, in-place writes, new memory, other strides and another reset ratio. A
write through `.data` to the same memory leaves no trace: for that, nothing is reused in evaluation,
and optimizers have `refresh`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..layer import MaskedLayer


def tensor_stamp(tensor: Tensor) -> tuple[object, int, int]:
    """Return what stays the same as long as nobody is seen to write to a tensor.

    That is identity, version and address.
    """
    try:
        return id(tensor), tensor._version, tensor.data_ptr()
    except RuntimeError:
        # An inference tensor counts no versions and can be written to in inference mode only.
        return object(), 0, 0


def stamp(layer: MaskedLayer) -> tuple | None:
    """Return what two calls with the same W * M have in common; None for a computed weight.

    Who keeps it beyond a forward keeps the memory, too (`memory_of`), so that no other tensor comes
    to lie there.
    """
    own = layer._parameters
    weight, threshold = own.get("weight"), own.get("threshold")
    if weight is None or threshold is None:
        return None
    try:
        return (
            id(weight), weight._version, weight.data_ptr(), weight.stride(),
            id(threshold), threshold._version, threshold.data_ptr(), layer.masking.reset_ratio,
        )  # fmt: skip
    except RuntimeError:  # as above
        return (object(),)


def memory_of(layer: MaskedLayer) -> tuple[Tensor, Tensor]:
    """Return tensors that hold on to the memory of weight and threshold."""
    return layer._parameters["weight"].detach(), layer._parameters["threshold"].detach()
