"""How much work a pass of a case is, whoever does it: the numerators of FLOP/s and bytes/s."""

from __future__ import annotations

import math

import torch

from .cases import MASKED_WEIGHT, LayerCase, ListCase
from .modes import Mode

__all__ = ["bytes_of", "flops", "least_bytes", "list_bytes", "weight_bytes"]

_PRODUCTS = {
    "forward": 1,
    "backward": 2,
    "forward_backward": 3,
    "step": 3,
    "grad_input": 1,
    "grad_weight": 1,
}


def flops(case: LayerCase, name: str) -> int | None:
    """Operations in the matrix products of a pass; None for an op without any."""
    if case.op == MASKED_WEIGHT:
        return None
    return 2 * case.M * case.N * case.K * _PRODUCTS[name]


def least_bytes(case: LayerCase, name: str) -> int | None:
    """Bytes that must be read and written once, thresholds and biases left out; None for a step.

    Masked weight: forward reads W and writes it in the compute dtype, backward reads W and the
    gradient and writes dW. Linear and convolution: every operand of the pass once.
    """
    weight, compute = bytes_of(case.mode.weight), bytes_of(case.mode.compute)
    weights = case.N * case.K
    if case.op == MASKED_WEIGHT:
        return weights * {"forward": weight + compute, "backward": compute + 2 * weight}[name]
    inputs, outputs = math.prod(case.input_shape), math.prod(case.output_shape)
    forward = weights * weight + (inputs + outputs) * compute
    # The gradients of input and weight read the gradient of the output together once.
    backward = 2 * weights * weight + (2 * inputs + outputs) * compute
    return {
        "forward": forward,
        "backward": backward,
        "forward_backward": forward + backward,
        "grad_input": forward,
        "grad_weight": 2 * weights * weight + (inputs + outputs) * compute,
    }.get(name)


def list_bytes(case: ListCase, name: str) -> int:
    """As `least_bytes` for a list of weights.

    A step reads G, reads and writes W and the optimizer's state, and writes next step's masked
    weight.
    """
    return case.numel * weight_bytes(case.mode, name)


def weight_bytes(mode: Mode, name: str) -> int:
    """Of one weight, in a pass over lists of them."""
    weight, compute = bytes_of(mode.weight), bytes_of(mode.compute)
    return {
        "pack": weight + compute,
        "post": compute + 2 * weight,
        "sgd": compute + 2 * weight + 2 * weight + compute,
        "adamw": compute + 2 * weight + 4 * weight + compute,
    }[name]


def bytes_of(dtype: torch.dtype) -> int:
    """Of one element."""
    return torch.finfo(dtype).bits // 8
