"""Geometries that the convolution tests share: the functional op, its shapes and its options."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import dst_kernels.functional as dst


@dataclass(frozen=True)
class Geometry:
    """One convolution; `input` includes the batch dimension unless it is left out on purpose."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict = field(default_factory=dict)

    @property
    def spatial(self) -> int:
        return len(self.weight) - 2

    @property
    def ours(self):
        return (dst.masked_conv1d, dst.masked_conv2d, dst.masked_conv3d)[self.spatial - 1]

    @property
    def torchs(self):
        functional = torch.nn.functional
        return (functional.conv1d, functional.conv2d, functional.conv3d)[self.spatial - 1]

    def __str__(self) -> str:
        return self.name


GEOMETRIES = (
    Geometry("conv1d", (2, 3, 6), (4, 3, 3)),
    Geometry("conv1d-strided-grouped", (2, 4, 8), (6, 2, 3), {"stride": 2, "groups": 2}),
    Geometry("conv1d-same", (2, 2, 5), (3, 2, 2), {"padding": "same", "dilation": 3}),
    Geometry("conv1d-unbatched", (3, 6), (4, 3, 3), {"padding": 1}),
    Geometry("conv2d", (2, 3, 5, 6), (4, 3, 3, 2)),
    Geometry(
        "conv2d-all",
        (2, 4, 6, 5),
        (4, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    ),
    Geometry("conv2d-depthwise", (1, 4, 5, 5), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    Geometry("conv2d-same", (1, 2, 4, 5), (3, 2, 2, 3), {"padding": "same"}),
    Geometry("conv2d-valid", (1, 2, 4, 4), (3, 2, 1, 1), {"padding": "valid"}),
    Geometry("conv2d-unbatched", (2, 4, 5), (3, 2, 3, 3), {"stride": 2, "padding": 1}),
    Geometry("conv3d", (1, 2, 3, 4, 3), (3, 2, 2, 2, 1), {"padding": (1, 0, 0)}),
    Geometry(
        "conv3d-all",
        (1, 4, 4, 3, 4),
        (4, 2, 2, 1, 2),
        {"stride": (2, 1, 1), "padding": 1, "dilation": (1, 1, 2), "groups": 2},
    ),
    Geometry("conv3d-unbatched", (2, 3, 3, 2), (2, 2, 2, 2, 2)),
)
