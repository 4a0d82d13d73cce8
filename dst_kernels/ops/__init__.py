"""Define the ops: schemas and fakes, checks of arguments, the geometry of convolutions.

This imports only torch, the reference and the choice of a backend; autograd functions use the ops.
"""

from .batching import is_batched, one_by_one
from .schemas import (
    NAMESPACE,
    call,
    can_commit,
    commit_masked_weight,
    effective_threshold,
    is_exporting,
    is_watched,
    masked_conv,
    masked_conv_grad_input,
    masked_conv_grad_weight,
    masked_linear,
    masked_linear_grad_input,
    masked_linear_grad_weight,
    masked_weight,
    masked_weight_backward,
    sparse_conv,
    sparse_linear,
    without_autograd_and_autocast,
)

__all__ = [
    "NAMESPACE",
    "call",
    "can_commit",
    "commit_masked_weight",
    "effective_threshold",
    "is_batched",
    "is_exporting",
    "is_watched",
    "masked_conv",
    "masked_conv_grad_input",
    "masked_conv_grad_weight",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_weight",
    "masked_weight_backward",
    "one_by_one",
    "sparse_conv",
    "sparse_linear",
    "without_autograd_and_autocast",
]
