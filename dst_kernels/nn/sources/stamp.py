"""What a masked weight was made from, and with that whether it is stale."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..layer import MaskedLayer

__all__ = ["Stamp", "memory_of", "stamp"]


class Stamp(NamedTuple):
    """What two calls with the same W * M have in common.

    It sees other Parameters, in-place writes, new memory, other strides and another reset ratio. A
    write through `.data` to the same memory leaves no trace: for that, nothing is reused in
    evaluation, and optimizers have `refresh`. Who keeps a stamp for long keeps the memory, too
    (`memory_of`), so that no other tensor comes to lie there.
    """

    weight: tuple  # identity, version, address, strides
    threshold: int  # identity
    reset_ratio: float | None
    threshold_version: object
    threshold_address: int

    def holds_in_forward(self, now: Stamp | None) -> bool:
        """Whether what a forward began with is right to its end.

        Another thread's forward may commit a reset to the threshold meanwhile; this one has its
        effective threshold by then.
        """
        return now is not None and self[:3] == now[:3]


def stamp(layer: MaskedLayer) -> Stamp | None:
    """Return the stamp of a layer as it is; None where its weight is computed."""
    weight, threshold = layer._parameters.get("weight"), layer._parameters.get("threshold")
    if weight is None or threshold is None:
        return None
    of_weight = id(weight), _version(weight), weight.data_ptr(), weight.stride()
    ratio = layer.masking.reset_ratio
    return Stamp(of_weight, id(threshold), ratio, _version(threshold), threshold.data_ptr())


def memory_of(layer: MaskedLayer) -> tuple[Tensor, Tensor]:
    """Return tensors that hold on to the memory of weight and threshold."""
    return layer._parameters["weight"].detach(), layer._parameters["threshold"].detach()


def _version(tensor: Tensor) -> object:
    # An inference tensor counts no versions and can be written to in inference mode only.
    return object() if tensor.is_inference() else tensor._version
