"""What a contender is, what is timed of it, and how much work that is, whoever does it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..cases import FP64, Case, LayerCase, ModelCase, WeightsCase
from ..networks import MODELS

PASSES = ("forward", "backward", "forward_backward")  # of single layers
PIECES = ("grad_input", "grad_weight")  # the gradient of the input alone, of the parameters alone
STREAMS = ("pack", "post")  # of weights: mask and cast them, make their gradients from the dense
STEPS = ("step", "optimizer")  # of whole models: all of a training step, its last part alone


@dataclass(frozen=True)
class Prepared:
    """A pass ready to be repeated; a first call may do more than the later ones."""

    call: Callable[[], object]  # inside of `surroundings()`
    surroundings: Callable[[], AbstractContextManager] = nullcontext
    memory_before: int | None = None  # bytes allocated before what counts; None: before a call
    moved: int | None = None  # bytes that must be moved, where the case alone does not say


class Work:
    """What a contender makes of a problem: passes to be timed, and results to be verified."""

    def prepare(self, name: str) -> Prepared:
        """Return a pass."""

    def results(self, replay: Callable | None = None) -> dict[str, Tensor]:
        """Return what the passes compute, by name; `replay` captures a training's step."""

    def saved_bytes(self) -> int | None:
        """Return the bytes that a forward saves beside input and parameters; None: nobody asks."""


@dataclass(frozen=True)
class Contender:
    """Someone who is measured."""

    name: str
    make: Callable[[Any], Work]  # of a case's problem; what it raises is recorded as the reason
    passes: tuple[str, ...] = PASSES
    masked: bool = True  # whether it computes the masked op, and so is verified
    compiled: bool = False  # by torch.compile, which takes long: measured last
    graphable: bool = True  # whether a CUDA graph can capture it
    exact: bool = True  # whether it computes in float64, too
    reference: Contender | None = None  # what is right; None: the reference of the op


def rates(case: Case, name: str, prepared: Prepared) -> Iterator[tuple[str, float, str]]:
    """Yield the metrics that are work over time: (metric, amount of work, unit)."""
    if isinstance(case, LayerCase):
        yield "flops", flops(case, name), "FLOP/s"
    if size := prepared.moved or least_bytes(case, name):
        yield "bandwidth", size, "B/s"
    if isinstance(case, ModelCase) and name == "step":
        model = MODELS[case.model]
        yield "throughput", case.batch * model.units, f"{model.unit}/s"


def flops(case: LayerCase, name: str) -> int:
    """Return the operations in the matrix products of a layer's pass."""
    return 2 * case.M * case.N * case.K * {"backward": 2, "forward_backward": 3}.get(name, 1)


def least_bytes(case: Case, name: str) -> int | None:
    """Return the bytes of all operands of a pass, read or written once; None for a whole model.

    Thresholds and biases are left out. Packing reads W and writes it in the compute dtype; post
    reads W and the gradient and writes dW.
    """
    weight, compute = case.mode.weight.itemsize, case.mode.compute.itemsize
    if isinstance(case, WeightsCase):
        return case.numel * {"pack": weight + compute, "post": compute + 2 * weight}[name]
    if not isinstance(case, LayerCase):
        return None
    inputs, weights, outputs = map(math.prod, case.shapes)
    forward = weights * weight + (inputs + outputs) * compute  # as many as grad_input
    grad_weight = forward + weights * weight
    backward = grad_weight + inputs * compute  # both read the output's gradient together once
    both = {"backward": backward, "forward_backward": forward + backward}
    return {"grad_weight": grad_weight, **both}.get(name, forward)


class Data:
    """A case's tensors on a device: random, the same for every contender and every run."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.mode = case, device, case.mode
        # Meta tensors, which have sizes and no numbers, have no generator of their own.
        self._generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(0)

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Draw a tensor, in float32: 16-bit generators give many exact zeros."""
        tensor = torch.randn(shape, generator=self._generator, device=self.device).mul_(scale)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return tensor.to(dtype).contiguous(memory_format=layout)

    def exact(self) -> Any:
        """Return the same numbers in float64."""
        other = copy.copy(self)
        vars(other).update(tree_map_only(Tensor, Tensor.double, vars(self)), mode=FP64)
        return other


def thresholds_for(weight: Tensor, remaining_ratio: float) -> Tensor:
    """Return float32 thresholds that keep `remaining_ratio` of each row of a weight [N, ...].

    The quantile of |W| in each row; where weights tie with it (16-bit weights), some fewer remain.
    """
    rows = weight.detach().flatten(1).abs().float()
    pruned = round(rows.shape[1] * (1 - remaining_ratio))
    return rows.kthvalue(pruned, dim=1).values if pruned else rows.new_zeros(len(rows))
