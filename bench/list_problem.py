"""The weights of a whole model with thresholds and dense gradients: data of a `ListCase`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cases import ListCase
from .problem import thresholds_for
from .shapes import WEIGHT_LISTS, Shape

__all__ = ["ListProblem"]


class _Layers(nn.Module):
    """Layers with these weights, side by side; each gets an input as large as one weight row."""

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(shape) for shape in shapes)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        outputs = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        return sum(output.float().square().sum() for output in outputs)


def _layer(shape: Shape) -> nn.Module:
    rows, columns, *kernel = shape
    if kernel:
        return nn.Conv2d(columns, rows, tuple(kernel), bias=False)
    return nn.Linear(columns, rows, bias=False)


class ListProblem:
    """A case with its data on a device: random, never zeros, the same for everybody.

    Attributes:
        case, device, mode
        weights: as they lie in memory; thresholds: float32 [rows] of each.
        grads: of the masked weights, in the compute dtype, with the weights' strides.
    """

    def __init__(self, case: ListCase, device: torch.device) -> None:
        self.case, self.device, self.mode = case, device, case.mode
        self._list = WEIGHT_LISTS[case.weights]
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: Shape) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device)
            if self._list.channels_last and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return tensor

        shapes = self._list.shapes
        self.weights = [
            random(shape).mul_(shape[1] ** -0.5).to(self.mode.weight) for shape in shapes
        ]
        self.thresholds = [
            thresholds_for(weight.flatten(1), case.remaining_ratio) for weight in self.weights
        ]
        self.grads = [random(shape).to(self.mode.compute) for shape in shapes]
        self._inputs = [random((1, *shape[1:])).to(self.mode.compute) for shape in shapes]

    def network(self, convert_) -> nn.Module:
        """Layers as `convert_` makes them from dense ones, with copies of weights and thresholds.

        Copies, so that the weights of the problem stay as they are.
        """
        with torch.device("meta"):
            model = _Layers(self._list.shapes)
        model.to_empty(device=self.device).to(self.mode.weight)
        for layer, weight in zip(model.layers, self.weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())
        model = convert_(model).train()
        with torch.no_grad():
            for layer, threshold in zip(model.layers, self.thresholds, strict=True):
                if hasattr(layer, "threshold"):
                    layer.threshold.copy_(threshold)
        return model

    def backward(self, model: nn.Module) -> None:
        """A forward and a backward of one token, then `grads` in the place of its gradients.

        So that everything is as in training, yet the same for everybody.
        """
        with self.mode.autocast(self.device.type):
            loss = model(self._inputs)
        loss.backward()
        for layer, grad in zip(model.layers, self.grads, strict=True):
            layer.weight.grad.copy_(grad)
