"""Triton kernels for NVIDIA GPUs: kernel and launcher per file, the ops on top.

`pack` and `post` serve any weight; `product` and `grad_weight` the linear layer. `variants` lists
what `python -m dst_kernels.aot` compiles. Nothing here knows about autograd or modules.
"""

import functools

from ..reference import group, regularization
from .linear import masked_linear, masked_linear_grad_input, masked_linear_grad_weight
from .weight import effective_threshold, masked_weight, masked_weight_backward

masked_weights = functools.partial(group.masked_weights, masked_weight=masked_weight)
masked_weights_backward = functools.partial(
    group.masked_weights_backward, masked_weight_backward=masked_weight_backward
)

__all__ = [
    "effective_threshold",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_weight",
    "masked_weight_backward",
    "masked_weights",
    "masked_weights_backward",
    "regularization",
]
