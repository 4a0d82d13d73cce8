"""Collect the flat lists that the step's ops take, and keep what does not change between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import FixedMask, MaskedWeightInMemory
from ..nn import MaskedLayer
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor
from ..reference.surrogate import SURROGATES
from ..reference.weight import largest_collapsed_count
from ._pairs import Pair


@dataclass(eq=False)
class Segment:
    """Hold a masked weight with its threshold, or any other parameter, and their rows of hypers."""

    parameter: nn.Parameter
    hyper: int
    pair: Pair | None = None
    threshold_hyper: int = -1  # -1: the threshold is not optimized
    masked: Sequence[MaskedWeight] = ()  # whose threshold the parameter is
    receives: bool = False  # whether its gradient may be of kept weights alone
    threshold: nn.Parameter | None = field(init=False)
    layer: MaskedLayer | None = field(init=False)  # the first of the pair's layers

    def __post_init__(self) -> None:
        self.threshold = None if self.pair is None else self.pair.threshold
        self.layer = None if self.pair is None else self.pair.layers[0]

    def is_regularised(self) -> bool:
        """Return whether the regulariser moves the segment's threshold: not of a frozen weight."""
        if self.threshold is not None:
            return self.threshold.requires_grad and self.parameter.requires_grad
        return self.parameter.requires_grad and not all([each.frozen for each in self.masked])


@dataclass(eq=False)
class Batch:
    """Hold the arguments of one call of an op.

    All segments are on one device (and on one mesh if they are sharded), and all are float64 or
    none is. `state` and `threshold_state` have one list of tensors for each kind of state, such as
    AdamW's averages; `kept` has one counter for each segment. Of segments in `fixed`, gradients are
    of the weights alone that the mask keeps; the op gets these, one after the other, as a parameter
    of its own.
    """

    device: torch.device
    double: bool
    kept: Tensor = field(init=False)
    segments: list[Segment] = field(default_factory=list)
    layers: list[MaskedLayer] = field(default_factory=list)  # of the segments that are pairs
    weights: list[Tensor] = field(default_factory=list)
    thresholds: list[Tensor] = field(default_factory=list)
    state: list[list[Tensor]] = field(default_factory=list)
    threshold_state: list[list[Tensor]] = field(default_factory=list)
    settings: list[int] = field(default_factory=list)
    threshold_grads: bool = False  # whether any threshold has a gradient
    first: bool = False  # whether this is the first step of any parameter here
    written: list[Tensor] = field(default_factory=list)  # all that a step may write, but W * M
    fixed: dict[int, FixedMask] = field(default_factory=dict)  # by number of the segment

    def __post_init__(self) -> None:
        self.absent = torch.empty(0, dtype=torch.float32, device=self.device)

    def grads(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of weights and of thresholds, with the strides of these.

        The second list is empty if thresholds have none.
        """
        of_weights = [
            self._grad(segment, segment.parameter, own, i in self.fixed)
            for i, (segment, own) in enumerate(zip(self.segments, self.weights, strict=True))
        ]
        if not self.threshold_grads:
            return of_weights, []
        of_thresholds = [
            self.absent
            if segment.threshold is None
            else self._grad(segment, segment.threshold, own)
            for segment, own in zip(self.segments, self.thresholds, strict=True)
        ]
        return of_weights, of_thresholds

    def _grad(
        self, segment: Segment, parameter: Tensor, own: Tensor, of_kept: bool = False
    ) -> Tensor:
        grad = parameter.grad
        if grad is None:
            return self.absent
        if of_kept:
            return grad._values()
        if segment.receives and grad.layout is torch.sparse_coo:
            grad = grad.to_dense()  # a sum, or of a mask that was another one
        if grad.layout is not torch.strided:
            raise RuntimeError(
                "sparse gradients are not supported (of a parameter of shape "
                f"{list(parameter.shape)}): use an embedding with sparse=False"
            )
        if own is not parameter:
            grad = local(grad)
        if grad.stride() != own.stride():
            grad = torch.empty_like(own, dtype=grad.dtype).copy_(grad)
        return grad

    def read(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return weights and state for the op: of `fixed` ones copies of what is kept."""
        if not self.fixed:
            return self.weights, self.state
        weights, state = [*self.weights], [[*column] for column in self.state]
        for i, mask in self.fixed.items():
            for which, column in enumerate((weights, *state)):
                if column[i].shape == self.weights[i].shape:  # neither absent nor AdamW's count
                    column[i] = mask.values(which, column[i]).clone()
        return weights, state

    def write(self, weights: list[Tensor], state: list[list[Tensor]]) -> None:
        """Write what the op has made of such copies."""
        for i, mask in self.fixed.items():
            dense = self.weights, *self.state
            for which, (into, column) in enumerate(zip(dense, (weights, *state), strict=True)):
                if column[i] is not into[i]:
                    mask.write(which, into[i], column[i])

    def placed(
        self,
        masked: Mapping[MaskedLayer, MaskedWeightInMemory],
        rows: Mapping[MaskedLayer, tuple[Tensor, Tensor] | None],
    ) -> list[Tensor]:
        """Return W * M of each segment, absent where `masked` has none of its layer.

        Columns and places follow if some `rows` are to be written.
        """
        known = [masked.get(each.layer) for each in self.segments]  # type: ignore[arg-type]
        placed = [self.absent if each is None else each.tensor for each in known]
        if not [each for each in rows.values() if each is not None]:
            return placed
        nothing = self.absent, self.absent
        pairs = [rows.get(each.layer) or nothing for each in self.segments]  # type: ignore[arg-type]
        return [*placed, *(columns for columns, _ in pairs), *(places for _, places in pairs)]

    def counted(
        self, masked: Mapping[MaskedLayer, MaskedWeightInMemory], may_skip: bool
    ) -> dict[MaskedLayer, int | None]:
        """Return how many weights each of these layers keeps, as far as the host can know."""
        if may_skip or self.device.type != "cpu":
            return dict.fromkeys(masked)
        counts = zip(self.segments, self.kept.tolist(), strict=True)
        return {
            each.layer: kept
            for each, kept in counts
            if each.layer is not None and each.layer in masked
        }

    def present(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return one float32 element on the device for each tensor, no element for None.

        Return an empty list if all are None.
        """
        if not [each for each in tensors if each is not None]:
            return []
        return [
            self.absent if each is None else each.to(self.device, torch.float32).reshape(1)
            for each in tensors
        ]


def collect(
    segments: Sequence[Segment],
    has_alpha: Sequence[bool],
    state_of: Callable[[nn.Parameter, int], tuple[list[Tensor], bool]],
    kinds: int,
    fixed: Mapping[int, FixedMask],
) -> list[Batch]:
    """Return the batches of the segments that this step updates.

    `fixed` has, by number, the masks of segments whose gradients are of kept weights alone.

    `state_of(parameter, row of hypers)` returns the parameter's `kinds` state tensors (none where
    the rule needs none) and whether this is their first step.
    """
    batches: dict[Any, Batch] = {}
    for number, segment in enumerate(segments):
        weight, threshold = segment.parameter, segment.threshold
        has_grad = weight.grad is not None
        of_weight = has_grad or (
            threshold is None and has_alpha[segment.hyper] and segment.is_regularised()
        )
        of_threshold = (
            threshold is not None
            and segment.threshold_hyper >= 0
            and (
                threshold.grad is not None
                or ((has_grad or has_alpha[segment.threshold_hyper]) and segment.is_regularised())
            )
        )
        if not (of_weight or of_threshold):
            continue
        mesh = (weight.device_mesh, weight.placements) if is_dtensor(weight) else None
        own = local(weight)
        kind = own.device, own.dtype == torch.float64
        batch = batches.setdefault((kind, mesh), Batch(*kind))
        if not batch.state:
            batch.state = [[] for _ in range(kinds)]
            batch.threshold_state = [[] for _ in range(kinds)]
        if number in fixed:
            batch.fixed[len(batch.segments)] = fixed[number]
        batch.segments.append(segment)
        if segment.layer is not None:
            batch.layers.append(segment.layer)
        batch.weights.append(_dense(own))
        batch.thresholds.append(batch.absent if threshold is None else local(threshold))
        batch.threshold_grads |= threshold is not None and threshold.grad is not None
        first = _add_state(batch, batch.state, state_of, weight, segment.hyper, of_weight)
        first_threshold = _add_state(
            batch, batch.threshold_state, state_of, threshold, segment.threshold_hyper, of_threshold
        )
        batch.first |= first or first_threshold
        batch.settings += (
            segment.hyper if of_weight else -1,
            segment.threshold_hyper if of_threshold else -1,
            *_masking(segment),
            int(first),
            int(first_threshold),
        )
    for batch in batches.values():
        batch.kept = torch.zeros(len(batch.segments), dtype=torch.int64, device=batch.device)
        lists = batch.weights, batch.thresholds, *batch.state, *batch.threshold_state
        batch.written = [each for column in lists for each in column if each is not batch.absent]
    return list(batches.values())


def _add_state(
    batch: Batch,
    lists: list[list[Tensor]],
    state_of: Callable[[nn.Parameter, int], tuple[list[Tensor], bool]],
    parameter: nn.Parameter | None,
    hyper: int,
    used: bool,
) -> bool:
    """Add a parameter's state to `lists`; return whether this is its first step."""
    tensors, first = state_of(parameter, hyper) if used and parameter is not None else ([], False)
    for i, column in enumerate(lists):
        column.append(local(tensors[i]) if tensors else batch.absent)
    return first


def _masking(segment: Segment) -> tuple[int, int, int]:
    """Return the settings: surrogate, structure gradient, largest kept count that is reset."""
    if segment.layer is None:
        return 0, 0, -1
    options = segment.layer.masking
    collapsed = -1
    if options.reset_ratio is not None:
        collapsed = largest_collapsed_count(segment.parameter.numel(), options.reset_ratio)
    return SURROGATES.index(options.surrogate), int(options.structure_gradient), collapsed


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and other tensors unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def on_device(value: float | Tensor | None) -> Tensor | None:
    """Return `value` if it is on a GPU, else None; a captured CUDA graph then sees its changes."""
    return value if isinstance(value, Tensor) and not value.is_cpu else None


def _dense(tensor: Tensor) -> Tensor:
    """Return `tensor`; raise ValueError where the ops cannot run over its memory in one piece."""
    if not tensor.is_floating_point():
        raise ValueError(
            "params: parameters must be real floating-point numbers, but one of shape "
            f"{list(tensor.shape)} is {tensor.dtype}"
        )
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            "params: parameters must be dense in memory, but one of shape "
            f"{list(tensor.shape)} has strides {list(strides)}"
        )
    return tensor
