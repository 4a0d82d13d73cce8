"""The tensors of a case: random, never zeros, the same for every provider and every run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import LINEAR, LayerCase
from .shapes import Shape

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
        inputs: what the layer is called with: (input in the compute dtype,), or () where the op has
            none.
        weight: in its dtype; threshold: float32 [N]; bias: [N] of a linear layer, else None.
        grad_output: the gradient of the output, in the compute dtype.

    Images and weights of convolutions lie in memory channels last.
    """

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        self.case, self.device, self.mode = case, device, case.mode
        # Meta tensors, which have sizes and no numbers, have no generator of their own.
        source = torch.device("cpu") if device.type == "meta" else device
        generator = torch.Generator(source).manual_seed(0)

        def random(shape: Shape, dtype: torch.dtype) -> Tensor:
            # Drawn in float32: 16-bit generators give many exact zeros.
            tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
            channels_last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return tensor.contiguous(memory_format=channels_last)

        weight, compute = self.mode.weight, self.mode.compute
        self.weight = random(case.weight_shape, weight).mul_(case.K**-0.5)
        self.threshold = thresholds_for(self.weight.flatten(1), case.remaining_ratio)
        self.inputs: tuple[Tensor, ...] = ()
        self.bias: Tensor | None = None
        if case.input_shape is not None:
            self.inputs = (random(case.input_shape, compute),)
        if case.op == LINEAR:
            self.bias = random((case.N,), weight).mul_(0.1)
        self.grad_output = random(case.output_shape, compute)

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
