"""Triton kernels for NVIDIA GPUs: kernel and launcher per file, the ops on top.

`pack` and `post` serve any weight; `product` and `grad_weight` the linear layer. `variants` lists
what `python -m dst_kernels.aot` compiles. Nothing here knows about autograd or modules.
"""

from .linear import masked_linear, masked_linear_grad_input, masked_linear_grad_weight
from .weight import effective_threshold, masked_weight, masked_weight_backward

__all__ = [
    "effective_threshold",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_weight",
    "masked_weight_backward",
]
