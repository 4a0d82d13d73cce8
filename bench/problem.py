"""The tensors of a case: random, never zeros, the same for every provider and every run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import MASKED_WEIGHT, Case

__all__ = ["Problem", "WeightOnly", "thresholds_for"]


def thresholds_for(weight: Tensor, remaining_ratio: float) -> Tensor:
    """float32 [N] thresholds, one a row, that keep `remaining_ratio` of each row of weight [N, K].

    The quantile of |W| in each row; where weights tie with it (16-bit weights), some fewer remain.
    """
    pruned = round(weight.shape[1] * (1 - remaining_ratio))
    if pruned == 0:
        return torch.zeros(weight.shape[0], device=weight.device)
    return weight.abs().float().kthvalue(pruned, dim=1).values


class Problem:
    """A case with its data on a device.

    Attributes:
        case, device, mode
        inputs: what the layer is called with: (input [M, K] in the compute dtype,), or () where
            the op has no tokens.
        weight: [N, K]; threshold: float32 [N]; bias: [N] in the weight's dtype, or None.
        grad_output: the gradient of the output, in the compute dtype.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.mode = case, device, case.mode
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            # Drawn in float32: 16-bit generators give many exact zeros.
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        N, K, compute = case.N, case.K, self.mode.compute
        self.weight = random(N, K, dtype=self.mode.weight).mul_(K**-0.5)
        self.threshold = thresholds_for(self.weight, case.remaining_ratio)
        self.inputs: tuple[Tensor, ...] = ()
        self.bias: Tensor | None = None
        if case.op == MASKED_WEIGHT:
            self.grad_output = random(N, K, dtype=compute)
        else:
            self.inputs = (random(case.M, K, dtype=compute),)
            self.bias = random(N, dtype=self.mode.weight).mul_(0.1)
            self.grad_output = random(case.M, N, dtype=compute)

    def load_(self, module: nn.Module) -> nn.Module:
        """Copy weight, bias and threshold into those parameters of the module that it has."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(getattr(self, name))
        return module


class WeightOnly(nn.Module):
    """A module for ops without input: computes `function(weight, threshold)` of its parameters."""

    def __init__(self, problem: Problem, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.weight.clone())
        self.threshold = nn.Parameter(problem.threshold.clone())
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.weight, self.threshold)
