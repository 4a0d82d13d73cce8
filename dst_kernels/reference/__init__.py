"""Specify every operation in plain PyTorch, for any float dtype up to fp64 and any device.

Other backends offer functions of the same names and signatures and are tested against these. Here
`threshold` is the *effective* one (the collapse guard already applied), except in functions with a
`reset_ratio`, which apply the guard and also return the effective threshold. Nothing in this folder
knows about autograd, modules or dispatch.
"""

from .conv import masked_conv, masked_conv_grad_input, masked_conv_grad_weight
from .conv_transpose import masked_conv_transpose
from .group import masked_weights, masked_weights_backward
from .kept import (
    KeptPlaces,
    KeptRows,
    kept_conv,
    kept_conv_grad_input,
    kept_conv_grad_weight,
    kept_dense,
    kept_linear,
    kept_linear_grad_input,
    kept_linear_grad_weight,
    kept_places,
    kept_rows,
    kept_values,
    kept_write_,
    new_kept_rows,
)
from .linear import masked_linear, masked_linear_grad_input, masked_linear_grad_weight
from .regularization import regularization, sparse_regularization
from .sparse import dense_weight, sparse_conv, sparse_linear
from .step import adamw_step_, grad_norm_, sgd_step_
from .surrogate import SURROGATES
from .weight import (
    effective_threshold,
    masked_weight,
    masked_weight_backward,
    threshold_mask,
)

__all__ = [
    "SURROGATES",
    "KeptPlaces",
    "KeptRows",
    "adamw_step_",
    "dense_weight",
    "effective_threshold",
    "grad_norm_",
    "kept_conv",
    "kept_conv_grad_input",
    "kept_conv_grad_weight",
    "kept_dense",
    "kept_linear",
    "kept_linear_grad_input",
    "kept_linear_grad_weight",
    "kept_places",
    "kept_rows",
    "kept_values",
    "kept_write_",
    "masked_conv",
    "masked_conv_grad_input",
    "masked_conv_grad_weight",
    "masked_conv_transpose",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_weight",
    "masked_weight_backward",
    "masked_weights",
    "masked_weights_backward",
    "new_kept_rows",
    "regularization",
    "sgd_step_",
    "sparse_conv",
    "sparse_linear",
    "sparse_regularization",
    "threshold_mask",
]
