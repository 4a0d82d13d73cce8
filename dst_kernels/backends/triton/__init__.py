"""Run Triton kernels on NVIDIA GPUs: one file per kernel and its launcher, the ops on top.

`pack` and `post` serve any weight; `product` and `grad_weight` the linear layer, `conv_product` and
`conv_grad_weight` convolutions. `python -m tests.compile_gate` compiles all without a GPU. Nothing
here knows about autograd or modules.
"""

import functools

from ...reference import group, regularization
from .conv import masked_conv, masked_conv_grad_input, masked_conv_grad_weight
from .linear import masked_linear, masked_linear_grad_input, masked_linear_grad_weight
from .weight import effective_threshold, masked_weight, masked_weight_backward

masked_weights = functools.partial(group.masked_weights, masked_weight=masked_weight)
masked_weights_backward = functools.partial(
    group.masked_weights_backward, masked_weight_backward=masked_weight_backward
)

__all__ = [
    "effective_threshold",
    "masked_conv",
    "masked_conv_grad_input",
    "masked_conv_grad_weight",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_weight",
    "masked_weight_backward",
    "masked_weights",
    "masked_weights_backward",
    "regularization",
]
