"""Replay whole training steps as one CUDA graph: one launch a step, whatever its kernels are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # steps before the capture, in which optimizers make their state and cuDNN chooses

Step = Callable[[Tensor, Tensor], Tensor]


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record `step` without running it; return what runs it, and its result's fixed place."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class GraphedStep:
    """Call a step for a few batches, then capture it and replay it for all others of their shape.

    `step(inputs, targets)` does all of a step on the device, begins without gradients and returns
    the loss. What is not on the device, such as a learning rate, keeps the value that it had in the
    capture: make a new one where that changes.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.calls = step, 0
        self.replay: Callable[[], Tensor] | None = None
        self.batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Do a step; the result is overwritten by the next call."""
        if self.batch is None:
            self.batch = torch.empty_like(inputs), torch.empty_like(targets)
        shapes = tuple(each.shape for each in self.batch)
        if self.calls < _WARM_UP or shapes != (inputs.shape, targets.shape):
            self.calls += 1
            return self.step(inputs, targets)
        for place, given in zip(self.batch, (inputs, targets), strict=True):
            place.copy_(given)
        if self.replay is None:
            fixed = self.batch
            self.replay = capture(lambda: self.step(*fixed))
        return self.replay()
