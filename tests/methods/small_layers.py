"""Build small layers whose weights, masks and momentum a test sets by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dst_kernels
from dst_kernels.methods.method import Method


def layers(*shapes: tuple[int, int], momentum: float = 0.9) -> tuple[nn.Module, torch.optim.SGD]:
    """Return masked linear layers of these shapes (out, in), and an SGD that never moves them."""
    model = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes))
    dst_kernels.sparsify_(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def put(
    method: Method, index: int, weight: list[float], momentum: list[float] | None = None
) -> None:
    """Give a layer these weights, a mask that keeps those that are not 0, and this momentum."""
    layer = method.layers[index]
    values = torch.tensor(weight).float().view(layer.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(values)
    layer.set_mask(values != 0)
    buffer = torch.ones(values.numel()) if momentum is None else torch.tensor(momentum).float()
    method.optimizer.state[layer.weight]["momentum_buffer"] = buffer.view_as(values)


def run(method: Method, steps: int) -> None:
    """Count steps in which the optimizer changes nothing."""
    for _ in range(steps):
        method.step()


def weights(method: Method, index: int = 0) -> list[float]:
    """Return a layer's weights, those that are masked out as 0."""
    layer = method.layers[index]
    assert not layer.weight[~layer.mask].any()
    return [round(value, 4) for value in layer.weight.flatten().tolist()]


def active(method: Method, index: int = 0) -> list[int]:
    """Return the flat places where a layer's mask is True."""
    return method.layers[index].mask.flatten().nonzero().flatten().tolist()


def momentum(method: Method, index: int = 0) -> Tensor:
    """Return a layer's momentum, flat."""
    return method.optimizer.state[method.layers[index].weight]["momentum_buffer"].flatten()
