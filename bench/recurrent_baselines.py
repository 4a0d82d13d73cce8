"""LSTMs to measure ours against: the authors', and one that plain PyTorch can do best."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .baselines import MaskedBaseline, authors_masked_weight, branch_free_masked_weight

__all__ = ["AuthorsLSTM", "BranchFreeLSTM"]

_GATES = 4


class _LSTM(MaskedBaseline, nn.LSTM):
    """One direction, batches first, states that start at zero, one threshold per row of a gate."""

    masked_weight: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def weight_names(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight")]

    def masked_gate(self, name: str, gate: int) -> Tensor:
        """W * M of one gate's matrix, guarded by itself."""
        weight = getattr(self, name)
        threshold = getattr(self, name.replace("weight", "threshold"))
        rows = gate * self.hidden_size, self.hidden_size
        return type(self).masked_weight(weight.narrow(0, *rows), threshold.narrow(0, *rows))


class AuthorsLSTM(_LSTM):
    """As the authors run it: a loop over time that masks all eight matrices anew at each step."""

    masked_weight = staticmethod(authors_masked_weight)

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        sequence = input.unbind(1)
        for layer in range(self.num_layers):
            hidden = cell = input.new_zeros(input.shape[0], self.hidden_size)
            outputs = []
            for row in sequence:
                i, f, g, o = (self._gate(layer, gate, row, hidden) for gate in range(_GATES))
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                outputs.append(hidden)
            sequence = outputs
        return torch.stack(outputs, 1), None

    def _gate(self, layer: int, gate: int, row: Tensor, hidden: Tensor) -> Tensor:
        sums = [
            F.linear(
                source,
                self.masked_gate(f"weight_{kind}_l{layer}", gate),
                getattr(self, f"bias_{kind}_l{layer}").chunk(_GATES)[gate],
            )
            for kind, source in (("ih", row), ("hh", hidden))
        ]
        return sums[0] + sums[1]


class BranchFreeLSTM(_LSTM):
    """Masked once per sequence, without the host; then torch's own LSTM."""

    masked_weight = staticmethod(branch_free_masked_weight)

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        parameters = []
        for name in self._flat_weights_names:
            if name.startswith("weight"):
                gates = [self.masked_gate(name, gate) for gate in range(_GATES)]
                parameters.append(torch.cat(gates))
            else:
                parameters.append(getattr(self, name))
        zeros = input.new_zeros(self.num_layers, input.shape[0], self.hidden_size)
        output, *_ = torch.lstm(
            input,
            (zeros, zeros),
            parameters,
            has_biases=True,
            num_layers=self.num_layers,
            dropout=0.0,
            train=self.training,
            bidirectional=False,
            batch_first=True,
        )
        return output, None
