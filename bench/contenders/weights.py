"""The weight side alone: masking and casting weights, and making their gradients, in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dst_kernels.backends import implementation

from ..cases import WeightsCase
from .work import STREAMS, Contender, Data, Prepared, Work, thresholds_for

_RESET_RATIO = 0.01


class Problem(Data):
    """Weights with thresholds, and the dense gradients of the masked weights, on a device."""

    def __init__(self, case: WeightsCase, device: torch.device) -> None:
        super().__init__(case, device)
        weight, compute, share = self.mode.weight, self.mode.compute, case.remaining_ratio
        self.weights = [self.draw(shape, weight, shape[1] ** -0.5) for shape in case.list]
        self.thresholds = [thresholds_for(one, share) for one in self.weights]
        self.grads = [self.draw(shape, compute) for shape in case.list]


class _WeightsWork(Work):
    def __init__(self, **calls: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> None:
        self._calls = calls

    def prepare(self, name: str) -> Prepared:
        return Prepared(self._calls[name])

    def results(self, replay: Callable | None = None) -> dict[str, Tensor]:
        return {
            f"{name}, {what} {index}": tensor
            for name, call in self._calls.items()
            for what, tensors in zip(("weight", "threshold"), call(), strict=True)
            for index, tensor in enumerate(tensors)
        }


def _dense(problem: Problem) -> Work:
    """Do what autocast does to the weights of dense layers and to their gradients."""

    def cast(tensors: list[Tensor], dtype: torch.dtype) -> Callable[[], object]:
        targets = [tensor.to(dtype, copy=True) for tensor in tensors]
        return lambda: torch._foreach_copy_(targets, tensors)

    weight, compute = problem.mode.weight, problem.mode.compute
    return _WeightsWork(pack=cast(problem.weights, compute), post=cast(problem.grads, weight))


def _masked(problem: Problem, backend: str = "auto") -> Work:
    pack = implementation(backend, problem.device, "masked_weights")
    post = implementation(backend, problem.device, "masked_weights_backward")
    weights, thresholds, count = problem.weights, problem.thresholds, len(problem.weights)
    guarded = [_RESET_RATIO] * count, [True] * count, problem.mode.compute
    rule = ["long_tailed"] * count, [True] * count
    return _WeightsWork(
        pack=lambda: pack(weights, thresholds, *guarded),
        post=lambda: post(problem.grads, weights, thresholds, *rule),
    )


REFERENCE = Contender("reference", partial(_masked, backend="reference"), STREAMS)
WEIGHTS = (
    Contender("dense", _dense, STREAMS, masked=False),
    Contender("auto", _masked, STREAMS),
)
