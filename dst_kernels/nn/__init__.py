"""Masked layers: subclasses of their torch.nn parents with a trainable pruning threshold."""

from ._group import group_, ungroup_
from ._masked import MaskedLayer
from ._module import GRANULARITIES, MaskedModule
from ._reuse import weights_unchanged
from .conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from .conv_transpose import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from .linear import MaskedLinear
from .recurrent import MaskedGRU, MaskedLSTM, MaskedRNN

__all__ = [
    "GRANULARITIES",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedGRU",
    "MaskedLSTM",
    "MaskedLayer",
    "MaskedLinear",
    "MaskedModule",
    "MaskedRNN",
    "group_",
    "ungroup_",
    "weights_unchanged",
]
