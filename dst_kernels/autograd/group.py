"""The masked weights of many layers as one node: one launch forward, one backward.

Each layer then multiplies with its masked weight in plain ATen calls, so that all that is left of
the method is these nodes. Their backward runs when the dense gradients G = dL/d(W * M) of all
layers have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import implementation
from ..ops import without_autograd_and_autocast

__all__ = ["mask_weights", "pack_weights", "with_dense_gradients"]


def pack_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """(every W * M in `dtype`, every effective threshold), outside autograd.

    The weights are on one device, and all float64 or none.
    Where `commit` says so, a reset by the guard is also written into the threshold.
    """
    device = weights[0].device
    double = weights[0].dtype == torch.float64
    function = implementation(backend, device, "masked_weights", double=double)
    with without_autograd_and_autocast(device.type):
        masked, effective = function(weights, thresholds, reset_ratios, commit, dtype)
    committed = [t for t, wanted in zip(thresholds, commit, strict=True) if wanted]
    if committed:
        torch.autograd.graph.increment_version(committed)
    return masked, effective


class _MaskWeights(torch.autograd.Function):
    """Inputs: packed and effective tensors, then all weights, then all thresholds."""

    @staticmethod
    def forward(ctx, masked, effective, options, *parameters):
        ctx.set_materialize_grads(False)
        *ctx.options, ctx.in_backward = options
        ctx.save_for_backward(*parameters[: len(masked)], *effective)
        return tuple(masked)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.in_backward()
        saved = ctx.saved_tensors
        n = len(grads)
        surrogates, structure, backend = ctx.options
        wanted = [
            i
            for i, grad in enumerate(grads)
            if grad is not None and (ctx.needs_input_grad[3 + i] or ctx.needs_input_grad[3 + n + i])
        ]
        results: list[Tensor | None] = [None] * (2 * n)
        if wanted:
            weight = saved[0]
            double = weight.dtype == torch.float64
            function = implementation(
                backend, weight.device, "masked_weights_backward", double=double
            )
            with without_autograd_and_autocast(weight.device.type):
                of_weights, of_thresholds = function(
                    *([these[i] for i in wanted] for these in (grads, saved[:n], saved[n:])),
                    *([these[i] for i in wanted] for these in (surrogates, structure)),
                )
            for i, of_weight, of_threshold in zip(wanted, of_weights, of_thresholds, strict=True):
                results[i] = of_weight if ctx.needs_input_grad[3 + i] else None
                results[n + i] = of_threshold if ctx.needs_input_grad[3 + n + i] else None
        return None, None, None, *results


def mask_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    reset_ratios: Sequence[float | None],
    commit: Sequence[bool],
    dtype: torch.dtype,
    surrogates: Sequence[str],
    structure_gradients: Sequence[bool],
    backend: str,
    in_backward: Callable[[], None],
) -> Sequence[Tensor]:
    """As `pack_weights`, with gradients to weights and thresholds.

    `in_backward` is called when they are made.
    """
    masked, effective = pack_weights(weights, thresholds, reset_ratios, commit, dtype, backend)
    options = surrogates, structure_gradients, backend, in_backward
    return _MaskWeights.apply(masked, effective, options, *weights, *thresholds)


class _WithDenseGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, masked, *parameters):
        ctx.set_materialize_grads(False)
        ctx.weights = parameters[: len(masked)]
        return tuple([each.detach() for each in masked])

    @staticmethod
    def backward(ctx, *grads):
        for weight, grad in zip(ctx.weights, grads, strict=True):
            if grad is not None and weight.grad is not None and weight.grad.dtype != weight.dtype:
                # The sum over micro-batches is in the weight's dtype, as it is anywhere in torch.
                so_far, weight.grad = weight.grad, None
                weight.grad_dtype = weight.dtype
                weight.grad = so_far.to(weight.dtype)
        return None, *grads, *[None] * len(grads)


def with_dense_gradients(
    masked: Sequence[Tensor], weights: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`masked` as if made from the weights by the identity: their gradients will be G itself.

    Thresholds take part without a gradient: whoever waits for all parameters (DDP) is told.
    """
    return _WithDenseGradients.apply(masked, *weights, *thresholds)
