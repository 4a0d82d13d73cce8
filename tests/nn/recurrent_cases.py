"""Masked recurrent modules of every kind, and the method written out for them.

What is expected comes from plain torch modules whose weights were masked gate by gate, and from
the authors' rule in tests/ops/authors.py; nothing of the code under test.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dst_kernels.nn import MaskedGRU, MaskedLSTM, MaskedRNN
from tests.ops import authors

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
INPUTS, UNITS, BATCH, STEPS = 5, 6, 3, 4

CASES = [
    (MaskedLSTM, {}),
    (MaskedLSTM, {"num_layers": 2, "bidirectional": True}),
    (MaskedLSTM, {"proj_size": 2}),
    (MaskedLSTM, {"bias": False, "batch_first": True}),
    (MaskedGRU, {}),
    (MaskedGRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
    (MaskedRNN, {"nonlinearity": "relu", "num_layers": 2}),
]
every_module = pytest.mark.parametrize(
    ("kind", "options"),
    CASES,
    ids=[f"{kind.__name__}-{'-'.join(options) or 'plain'}" for kind, options in CASES],
)


def build(kind, options=None, dtype: torch.dtype = torch.float64, **masking) -> nn.Module:
    """With thresholds that prune some of each gate's weights."""
    module = kind(INPUTS, UNITS, dtype=dtype, **(options or {}), **masking)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            low, high = (0.05, 0.25) if name.startswith("threshold") else (-0.6, 0.6)
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(low + (high - low) * values)
    return module


def sequence(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(STEPS, BATCH, INPUTS, generator=generator, dtype=torch.float64).to(dtype)


def gates_of(module: nn.Module, name: str) -> int:
    return 1 if "_hr_" in name else GATES[module.dense_type]


def stacks(module: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By weight: (matrix, threshold) of each gate."""
    found = {}
    for name, weight in module.named_parameters():
        if name.startswith("weight"):
            threshold = getattr(module, "threshold" + name.removeprefix("weight"))
            count = gates_of(module, name)
            rows = weight.shape[0] // count
            parts = threshold.shape[0] // count
            found[name] = [
                (weight[i * rows : (i + 1) * rows], threshold[i * parts : (i + 1) * parts])
                for i in range(count)
            ]
    return found


def expected_masks(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.cat(
            [authors.mask(w, authors.effective(w, t, module.reset_ratio)) for w, t in pairs]
        )
        for name, pairs in stacks(module).items()
    }


def dense_twin(module: nn.Module, options=None) -> nn.Module:
    """A plain torch module with the masked weights."""
    dtype = next(module.parameters()).dtype
    twin = module.dense_type(INPUTS, UNITS, dtype=dtype, **(options or {}))
    masks = expected_masks(module)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            own = module.get_parameter(name)
            parameter.copy_(own * masks[name] if name in masks else own)
    twin.train(module.training)
    return twin


def expected_gradients(module: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """From the gradients of the twin's weights: those of the module's parameters."""
    found = {name: p.grad for name, p in twin.named_parameters() if name.startswith("bias")}
    for name, pairs in stacks(module).items():
        grads = twin.get_parameter(name).grad.chunk(gates_of(module, name))
        gradients = [
            authors.gradients(
                grad, w, authors.effective(w, t, module.reset_ratio), module.surrogate,
                module.structure_gradient,
            )
            for grad, (w, t) in zip(grads, pairs, strict=True)
        ]  # fmt: skip
        found[name] = torch.cat([of_weight for of_weight, _ in gradients])
        threshold = name.replace("weight", "threshold")
        found[threshold] = torch.cat([of_threshold for _, of_threshold in gradients])
    return found


def objective(outputs) -> Tensor:
    """Of all that a recurrent module returns."""
    if isinstance(outputs, Tensor):
        numbers = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
        return (outputs * numbers.cos().view_as(outputs)).sum()
    return sum(objective(each) for each in outputs if isinstance(each, (Tensor, tuple)))
