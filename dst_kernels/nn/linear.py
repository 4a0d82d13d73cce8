"""Run a linear layer with a masked weight."""

from __future__ import annotations

from torch import Tensor, nn

from .. import autograd
from .layer import MaskedLayer
from .sources import attached_weight, known_of


class MaskedLinear(MaskedLayer, nn.Linear):
    """Run `torch.nn.Linear` with only the weights whose magnitude exceeds their threshold.

    Positional arguments, `device` and `dtype` are those of the parent; the forward takes [..., in]
    and returns [..., out]. Method: Liu et al., "Dynamic Sparse Training", ICLR 2020.

    Args:
        granularity: what one threshold governs: "row" (an output neuron, the paper's choice),
            "layer" or "element".
        reset_ratio: collapse guard. If at most this share of the weights would remain, all
            thresholds count as 0; a training forward also writes these zeros into `threshold`.
            None switches it off.
        surrogate: see `dst_kernels.functional.masked_weight`.
        structure_gradient: whether the mask's surrogate gradient also reaches the weight.
        backend, path: see `dst_kernels.functional.masked_linear`.

    Raises:
        ValueError: unknown granularity, surrogate, backend or path; reset_ratio outside [0, 1].
        TypeError: a dtype other than float16, bfloat16, float32, float64.
        RuntimeError: a backend asked for by name that is not available.
    """

    dense_type = nn.Linear
    _keeps_rows = True

    def forward(self, input: Tensor) -> Tensor:
        bias = self._parameters.get("bias")
        if bias is None:  # none, or one that is computed, which only this slower way finds
            bias = self.bias
        attached = attached_weight(self, input)
        if attached is not None:
            return autograd.attached_linear(
                input, attached, bias, self.masking, known_of(self, attached)
            )
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_linear(
                input, weight, threshold, bias, *how
            )
        )
