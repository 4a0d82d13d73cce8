"""Networks with every kind of layer, trained a step on Triton's fused products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.nn import MaskedLayer


class Block(nn.Module):
    """Pointwise, depthwise and strided convolutions, a line, and a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 4, 2, stride=2)
        self.wide = nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, (1, 3), padding="same", groups=6, bias=False)
        self.narrow = nn.Conv2d(6, 4, 1, stride=2)
        self.line = nn.Conv1d(4, 5, 2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.wide(self.start(image).relu()).relu()
        hidden = self.narrow(self.depthwise(hidden)).relu()
        return self.head(self.line(hidden.flatten(2)).mean(-1))


def masked(path: str, device, **options) -> nn.Module:
    torch.manual_seed(0)
    model = Block().to(device, memory_format=torch.channels_last)
    config = dst_kernels.SparsifyConfig(path=path, **options)
    model = dst_kernels.sparsify_(model, config)
    for layer in model.modules():
        if isinstance(layer, MaskedLayer):
            layer.threshold.data.copy_(layer.weight.detach().abs().flatten(1).mean(1))
    model.wide.reset_threshold(9.0)  # collapses
    return model


def gradients(model: nn.Module, dtype: torch.dtype, device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(3, 3, 8, 8, generator=generator).to(device, dtype)
    model(input.to(memory_format=torch.channels_last)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", ["fused", "mixed", "packed", "auto"])
def test_gradients_are_those_of_the_reference(path, device):
    model = masked(path, device, backend="triton")
    exact = copy.deepcopy(masked("packed", device, backend="reference")).double()
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours = gradients(model, torch.float32, device)
    for name, truth in gradients(exact, torch.float64, device).items():
        scale = truth.abs().max().item()
        torch.testing.assert_close(
            ours[name].double(),
            truth,
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert not model.wide.threshold.any(), "its reset is committed"
    assert all(layer.threshold.grad.any() for layer in model.children())
