"""Wrap the ops in autograd functions: what is saved, which gradients are computed, autocast.

On the packed path a masked weight is a node of its own, and torch's own operation multiplies with
it; fused and mixed paths are one node for both. They save the weight, the effective threshold and
what the product needs; never a mask. They can be differentiated once: the surrogate is not a
derivative, so there is no second one.
"""

from ._function import product_dtype
from .conv import attached_conv, masked_conv
from .conv_transpose import masked_conv_transpose, masked_conv_transpose_weight
from .fixed import FixedMask, fixed_weight, may_keep_rows
from .kept import MaskedWeightInMemory
from .linear import attached_linear, masked_linear
from .options import GRANULARITIES, MaskOptions, check_options
from .regularization import sparse_regularization
from .sparse import sparse_product
from .weight import COMMITTED, FRESH, MADE, Packed, WeightSource, masked_weight, pack
from .weights import mask_weights, pack_weights, with_dense_gradients

__all__ = [
    "COMMITTED",
    "FRESH",
    "GRANULARITIES",
    "MADE",
    "FixedMask",
    "MaskOptions",
    "MaskedWeightInMemory",
    "Packed",
    "WeightSource",
    "attached_conv",
    "attached_linear",
    "check_options",
    "fixed_weight",
    "mask_weights",
    "masked_conv",
    "masked_conv_transpose",
    "masked_conv_transpose_weight",
    "masked_linear",
    "masked_weight",
    "may_keep_rows",
    "pack",
    "pack_weights",
    "product_dtype",
    "sparse_product",
    "sparse_regularization",
    "with_dense_gradients",
]
