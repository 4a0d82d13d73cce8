"""The masked weights of a recurrent module as one node: one launch forward, one backward.

Its weights are stacks of gate matrices. Each matrix is masked, and guarded, by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import implementation
from ..ops import without_autograd_and_autocast

__all__ = ["Stack", "mask_stacks"]


@dataclass(frozen=True)
class Stack:
    """Weight [matrices * rows, columns] and its threshold, which splits into as many parts."""

    weight: Tensor
    threshold: Tensor
    matrices: int


def mask_stacks(
    stacks: Sequence[Stack],
    biases: Sequence[Tensor],
    out: tuple[Sequence[Tensor], Sequence[Tensor]],
    reset_ratio: float | None,
    commit: bool,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(every W * M, every bias), written into `out` and cast to its dtype; with gradients.

    All tensors are on one device; the tensors of `out` are contiguous. `commit`: a reset by the
    guard is also written into the threshold.
    """
    weights = [stack.weight for stack in stacks]
    thresholds = [stack.threshold for stack in stacks]
    counts = [stack.matrices for stack in stacks]
    masked, copies = out
    matrices = sum(counts)
    with without_autograd_and_autocast(weights[0].device.type):
        _, effective = _function("masked_weights", backend, weights)(
            _split(weights, counts),
            _split(thresholds, counts),
            [reset_ratio] * matrices,
            [commit] * matrices,
            masked[0].dtype,
            _split(masked, counts),
        )
        if biases:
            torch._foreach_copy_(copies, list(biases))
    if commit:
        torch.autograd.graph.increment_version(thresholds)
    options = counts, surrogate, structure_gradient, backend
    made = _MaskStacks.apply(masked, copies, effective, options, *weights, *thresholds, *biases)
    return made[: len(masked)], made[len(masked) :]


class _MaskStacks(torch.autograd.Function):
    """Inputs: what was made, then all weights, all thresholds, all biases."""

    @staticmethod
    def forward(ctx, masked, copies, effective, options, *parameters):
        n = len(masked)
        ctx.options = options
        ctx.threshold_shapes = [threshold.shape for threshold in parameters[n : 2 * n]]
        ctx.save_for_backward(*parameters[:n], *effective)
        return *masked, *copies

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        counts, surrogate, structure_gradient, backend = ctx.options
        n, matrices = len(counts), sum(counts)
        weights, effective = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        of_biases = grads[n:]  # autograd casts them to what the biases are
        if not any(ctx.needs_input_grad[4 : 4 + 2 * n]):
            return None, None, None, None, *[None] * (2 * n), *of_biases
        of_weights = [torch.empty_like(weight) for weight in weights]
        of_thresholds = [effective[0].new_empty(shape) for shape in ctx.threshold_shapes]
        with without_autograd_and_autocast(weights[0].device.type):
            _function("masked_weights_backward", backend, weights)(
                _split(grads[:n], counts),
                _split(weights, counts),
                effective,
                [surrogate] * matrices,
                [structure_gradient] * matrices,
                (_split(of_weights, counts), _split(of_thresholds, counts)),
            )
        wanted = zip(of_weights + of_thresholds, ctx.needs_input_grad[4:], strict=False)
        results = [grad if needed else None for grad, needed in wanted]
        return None, None, None, None, *results, *of_biases


def _function(op: str, backend: str, weights: Sequence[Tensor]):
    double = weights[0].dtype == torch.float64
    return implementation(backend, weights[0].device, op, double=double)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Every matrix, or what belongs to it, as a view."""
    return [
        part for tensor, count in zip(tensors, counts, strict=True) for part in tensor.chunk(count)
    ]
