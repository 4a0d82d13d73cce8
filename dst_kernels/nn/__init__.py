"""Masked layers: subclasses of their torch.nn parents with a trainable pruning threshold."""

from .conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from .conv_transpose import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from .layer import MaskedLayer
from .linear import MaskedLinear
from .module import GRANULARITIES, MaskedModule
from .recurrent import MaskedGRU, MaskedLSTM, MaskedRNN
from .sources.group import group_, ungroup_
from .sources.reuse import weights_unchanged

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
