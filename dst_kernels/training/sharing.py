"""Cut batches into the parts that one process takes, one forward and backward each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Hold a part of a batch; `weight` times its mean loss, averaged over processes, adds up.

    The sum over a step's parts is the mean loss of the whole batch. A weight of 0 marks a part that
    another process takes already: it is there so that all processes do the same.
    """

    inputs: Tensor
    targets: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Share:
    """Say which parts of each batch this process takes: `count` of `parts`, from `first` on."""

    first: int = 0
    count: int = 1
    parts: int = 1

    def of(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """Yield this process's parts of a batch (a sequence or tensor), and their weights.

        A batch that is too small for parts of two samples, which batch normalisation needs, has
        fewer of them; the rest of the processes gets the first part with weight 0.
        """
        samples = len(batch)
        used = max(1, min(self.parts, samples // 2))
        for part in range(self.first, self.first + self.count):
            index = part if part < used else 0
            start, end = (samples * i // used for i in (index, index + 1))
            weight = (end - start) * (self.parts // self.count) / samples
            yield batch[start:end], weight if part < used else 0.0


WHOLE = Share()
