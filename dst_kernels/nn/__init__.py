"""Offer masked layers and sparse ones.

Masked layers are subclasses of their torch.nn parents with a trainable pruning threshold; sparse
layers run what was trained, with a weight stored without its zeros.
"""

from ..autograd import GRANULARITIES, MaskOptions
from .conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from .conv_transpose import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from .layer import MaskedLayer
from .linear import MaskedLinear
from .module import MaskedModule
from .parameters import mask_parameter_
from .recurrent import MaskedGRU, MaskedLSTM, MaskedRNN
from .sparse import SparseConv1d, SparseConv2d, SparseLinear
from .switches import group_, ungroup_, weights_unchanged

__all__ = [
    "GRANULARITIES",
    "MaskOptions",
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
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "group_",
    "mask_parameter_",
    "ungroup_",
    "weights_unchanged",
]
