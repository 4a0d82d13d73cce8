"""The networks whose training steps are measured, in plain torch.nn: nothing here is masked yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "VGG", "RowLSTM", "WideResNet", "lenet_5", "lenet_300_100"]

_VGG_16 = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)


def lenet_300_100(linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """784-300-100-10 with ReLU between."""
    return nn.Sequential(linear(784, 300), nn.ReLU(), linear(300, 100), nn.ReLU(), linear(100, 10))


def lenet_5() -> nn.Sequential:
    """In Caffe's form, for 28x28 images: 20 and 50 filters of 5x5, then 500 units."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class RowLSTM(nn.Module):
    """Reads images row by row: two LSTM layers, then a linear layer on their last output."""

    def __init__(self, width: int = 28, units: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, units, num_layers=2, batch_first=True)
        self.fc = nn.Linear(units, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.lstm(images)[0][:, -1])


class VGG(nn.Sequential):
    """VGG for 32x32 images with batch norm; by default the 13 convolutions of VGG-16.

    Args:
        layers: filters of each convolution; None halves the image.
        classes: of the last layer.
    """

    def __init__(self, layers: Sequence[int | None] = _VGG_16, classes: int = 10) -> None:
        features: list[nn.Module] = []
        inputs = 3
        for filters in layers:
            if filters is None:
                features.append(nn.MaxPool2d(2))
                continue
            features += [
                nn.Conv2d(inputs, filters, 3, padding=1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(inplace=True),
            ]
            inputs = filters
        super().__init__(
            *features,
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(inputs, inputs),
            nn.BatchNorm1d(inputs),
            nn.ReLU(inplace=True),
            nn.Linear(inputs, classes),
        )
        for module in self:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.constant_(module.weight, 0.5)


class _WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; 1x1 where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        active = F.relu(self.norm1(input), inplace=True)
        residual = input if self.shortcut is None else self.shortcut(active)
        hidden = F.relu(self.norm2(self.conv1(active)), inplace=True)
        return self.conv2(hidden) + residual


class WideResNet(nn.Sequential):
    """Wide ResNet for 32x32 images: WRN-`depth`-`width`."""

    def __init__(self, depth: int = 28, width: int = 8, classes: int = 10) -> None:
        blocks: list[nn.Module] = []
        inputs = 16
        for group, filters in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                blocks.append(_WideBlock(inputs, filters, 2 if group and not block else 1))
                inputs = filters
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, classes),
        )


class _Block(nn.Module):
    """Causal attention and a perceptron four times as wide, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, input: Tensor) -> Tensor:
        hidden = input + self.out(self._attention(self.norm1(input)))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh"))

    def _attention(self, input: Tensor) -> Tensor:
        query, key, value = self.qkv(input).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (each.transpose(-3, -2) for each in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(-3, -2).flatten(-2)


class GPT(nn.Module):
    """A decoder-only transformer, GPT-2's smallest by default: 124 M parameters, no dropout.

    The head shares its weight with the embedding, and so stays dense when the model is converted.
    """

    def __init__(
        self,
        vocabulary: int = 50257,
        context: int = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(hidden)))
