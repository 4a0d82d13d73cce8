"""One small instance of every masked layer of `dst_kernels.nn`, for tests that hold for all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLinear,
)
from tests.ops import authors


@dataclasses.dataclass(frozen=True)
class Case:
    """A masked layer, its torch parent, the positional arguments and an input shape of both."""

    masked: type[nn.Module]
    dense: type[nn.Module]
    args: tuple
    input_shape: tuple[int, ...]

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(dtype)


CASES = [
    Case(MaskedLinear, nn.Linear, (6, 5), (4, 6)),
    Case(MaskedConv1d, nn.Conv1d, (4, 6, 3), (2, 4, 9)),
    Case(MaskedConv2d, nn.Conv2d, (4, 6, 3), (2, 4, 7, 8)),
    Case(MaskedConv3d, nn.Conv3d, (4, 6, 2), (2, 4, 4, 5, 3)),
    Case(MaskedConvTranspose1d, nn.ConvTranspose1d, (4, 6, 3), (2, 4, 9)),
    Case(MaskedConvTranspose2d, nn.ConvTranspose2d, (4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 6)),
    Case(MaskedConvTranspose3d, nn.ConvTranspose3d, (4, 6, 2, 1, 0, 0, 2), (2, 4, 3, 4, 2)),
]

every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.masked.__name__)
GRANULARITIES = ("row", "layer", "element")
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def collapsing(layer: nn.Module) -> nn.Module:
    """Put the thresholds above every weight, so that the next training forward resets them."""
    layer.reset_threshold(10.0)
    return layer


def threshold_of_each_weight(layer: nn.Module) -> Tensor:
    """The layer's threshold in the shape of its weight."""
    threshold, weight = layer.threshold.detach(), layer.weight
    if "Transpose" not in type(layer).__name__ or threshold.dim() > 1:
        return authors.spread(threshold, weight.shape)
    rows = authors.transposed(weight, layer.groups)
    return authors.transposed(authors.spread(threshold, rows.shape), layer.groups)
