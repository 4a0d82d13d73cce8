"""The weights of whole models, as shapes: what kernels over lists of tensors stream through."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["WEIGHT_LISTS", "Shape", "WeightList", "resnet_50"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightList:
    """`channels_last`: whether the convolutions' weights lie in memory so."""

    shapes: tuple[Shape, ...]
    channels_last: bool = False

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def resnet_50() -> tuple[Shape, ...]:
    """The 53 convolutions of ResNet-50 and its last layer, in order."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            outputs = 4 * width
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                shapes.append((outputs, inputs, 1, 1))
            inputs = outputs
    return (*shapes, (1000, inputs))


WEIGHT_LISTS = {
    "4x4096x4096": WeightList(((4096, 4096),) * 4),
    "resnet-50": WeightList(resnet_50(), channels_last=True),
    "small": WeightList(((96, 64), (8, 3, 3, 3), (16, 8, 1, 1), (33, 70)), channels_last=True),
}
