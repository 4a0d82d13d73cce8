"""Small networks of masked and other layers, with four outputs, and the shape of their inputs."""

from __future__ import annotations

import torch
from torch import nn

from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedLinear,
)


def linear(**options):
    return nn.Sequential(
        MaskedLinear(12, 20, **options), nn.ReLU(),
        MaskedLinear(20, 16, bias=False, **options), nn.ReLU(),
        MaskedLinear(16, 4, **options),
    ).double(), (12,)  # fmt: skip


def with_dense_layers(**options):
    """Batch norm, and a dense layer between masked ones."""
    return nn.Sequential(
        MaskedLinear(12, 20, bias=False, **options), nn.BatchNorm1d(20), nn.ReLU(),
        nn.Linear(20, 16), nn.ReLU(), MaskedLinear(16, 4, **options),
    ).double(), (12,)  # fmt: skip


def conv1d(**options):
    return nn.Sequential(
        MaskedConv1d(4, 6, 3, stride=2, padding=1, **options), nn.ReLU(),
        MaskedConv1d(6, 8, 2, dilation=2, groups=2, padding_mode="circular", padding=1, **options),
        nn.ReLU(), nn.Flatten(), MaskedLinear(40, 4, **options),
    ).double(), (4, 10)  # fmt: skip


def conv2d(**options):
    return nn.Sequential(
        MaskedConv2d(2, 6, 3, padding=1, bias=False, **options), nn.BatchNorm2d(6), nn.ReLU(),
        MaskedConv2d(6, 9, (2, 3), groups=3, **options), nn.ReLU(), nn.Conv2d(9, 5, 1), nn.ReLU(),
        nn.Flatten(), MaskedLinear(60, 4, **options),
    ).double(), (2, 4, 6)  # fmt: skip


def channels_last(**options):
    model, shape = conv2d(**options)
    return model.to(memory_format=torch.channels_last), shape


def conv3d(**options):
    return nn.Sequential(
        MaskedConv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), **options), nn.ReLU(),
        MaskedConv3d(4, 6, 2, dilation=(1, 2, 1), groups=2, **options), nn.ReLU(),
        nn.Flatten(), MaskedLinear(144, 4, **options),
    ).double(), (2, 3, 4, 5)  # fmt: skip


def other_granularities(**options):
    """One threshold for a layer, one for each weight, and as usual one for each row."""
    return nn.Sequential(
        MaskedLinear(12, 20, granularity="layer", **options), nn.ReLU(),
        MaskedLinear(20, 16, granularity="element", **options), nn.ReLU(),
        MaskedLinear(16, 4, **options),
    ).double(), (12,)  # fmt: skip


def transposed(**options):
    """Layers as in GPT-2, which store their rows as columns."""
    from dst_kernels.nn.huggingface import MaskedTransformersConv1D

    model = nn.Sequential(
        MaskedTransformersConv1D(20, 12, **options), nn.ReLU(), MaskedLinear(20, 4, **options)
    )
    nn.init.normal_(model[0].weight, std=0.3)
    return model.double(), (12,)


def conv_transpose(**options):
    """A layer whose rows are not in one piece, in front of one that can leave its gradients."""
    return nn.Sequential(
        MaskedConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, **options), nn.ReLU(),
        nn.Flatten(), MaskedLinear(96, 4, **options),
    ).double(), (4, 2, 2)  # fmt: skip


NETWORKS = [
    linear, with_dense_layers, conv1d, conv2d, channels_last, conv3d, other_granularities,
    transposed, conv_transpose,
]  # fmt: skip
