"""Autograd functions around the ops: what is saved, which gradients are computed, autocast.

They save the input, the weight, the effective threshold and, on the packed path, the masked weight
in the compute dtype; never a mask. They can be differentiated once: the surrogate is not a
derivative, so there is no second one.
"""

from ._function import product_dtype
from .conv import masked_conv
from .conv_transpose import masked_conv_transpose
from .group import mask_weights, pack_weights, with_dense_gradients
from .linear import masked_linear
from .recurrent import Stack, mask_stacks
from .regularization import sparse_regularization
from .weight import masked_weight, pack

__all__ = [
    "Stack",
    "mask_stacks",
    "mask_weights",
    "masked_conv",
    "masked_conv_transpose",
    "masked_linear",
    "masked_weight",
    "pack",
    "pack_weights",
    "product_dtype",
    "sparse_regularization",
    "with_dense_gradients",
]
