"""Offer the functions of the backends "cpu" and "cuda"; load the CPU library before the import."""

from .regularization import regularization
from .sparse import (
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
    sparse_conv,
    sparse_linear,
)
from .step import adamw_step_, grad_norm_, sgd_step_
from .weight import (
    effective_threshold,
    masked_weight,
    masked_weight_backward,
    masked_weights,
    masked_weights_backward,
)

__all__ = [
    "adamw_step_",
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
    "masked_weight",
    "masked_weight_backward",
    "masked_weights",
    "masked_weights_backward",
    "regularization",
    "sgd_step_",
    "sparse_conv",
    "sparse_linear",
]
