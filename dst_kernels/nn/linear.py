"""Masked linear layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .. import autograd
from .layer import MaskedLayer
from .sources import attached_weight


class MaskedLinear(MaskedLayer, nn.Linear):
    """`torch.nn.Linear` that computes with the weights whose magnitude exceeds their threshold.

    Positional arguments, `device` and `dtype` as in the parent; input [..., in] -> [..., out].

    Args:
        granularity: what one threshold governs: "row" (an output neuron, the paper's choice),
            "layer" or "element".
        reset_ratio: collapse guard. Where at most this share of the weights would remain, all
            thresholds count as 0; a training forward also writes that into `threshold`. None
            switches it off.
        surrogate: see `dst_kernels.functional.masked_weight`.
        structure_gradient: whether the mask's surrogate gradient also reaches the weight.
        backend, path: see `dst_kernels.functional.masked_linear`.

    Raises:
        ValueError: unknown granularity, surrogate, backend or path; reset_ratio outside [0, 1].
        TypeError: a dtype other than float16, bfloat16, float32, float64.
        RuntimeError: a backend asked for by name that cannot serve.
    """

    dense_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        bias = self._parameters.get("bias")
        if bias is None:  # or computed: the slow way
            bias = self.bias
        attached = attached_weight(self, input)
        if attached is not None:
            return F.linear(input, attached, bias)
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_linear(
                input, weight, threshold, bias, *how
            )
        )
