"""Masked layers: subclasses of their torch.nn parents with a trainable pruning threshold."""

from ._group import group_, ungroup_
from ._masked import GRANULARITIES, MaskedLayer
from ._reuse import weights_unchanged
from .conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from .conv_transpose import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from .linear import MaskedLinear

__all__ = [
    "GRANULARITIES",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedLayer",
    "MaskedLinear",
    "group_",
    "ungroup_",
    "weights_unchanged",
]
