"""Mask transformers' own `Conv1D` (in GPT-2 and others): a linear layer stored transposed.

This file imports transformers, so no other file imports it before a model has such a layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import autograd
from .layer import MaskedLayer


class MaskedTransformersConv1D(MaskedLayer, Conv1D):
    """Run `transformers.pytorch_utils.Conv1D` with masked weights; the weight is [in, out].

    A row is one output neuron, as elsewhere: here a column of the stored weight. Keyword-only
    arguments and errors are those of `MaskedLinear`.
    """

    dense_type = Conv1D
    rows_first = _as_stored = False

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.t() if tensor.dim() == 2 else tensor

    def reset_parameters(self) -> None:
        """Initialise as the parent's constructor: weight from N(0, 0.02), bias and thresholds 0."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.reset_threshold()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self._masking_repr()}"

    def forward(self, input: Tensor) -> Tensor:
        return self._masked(
            lambda weight, threshold, *how: autograd.masked_linear(
                input, weight, threshold, self.bias, *how
            )
        )
