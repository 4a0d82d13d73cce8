"""Mask many weights as one node: one launch forward, one backward.

A weight may be a stack of matrices (the gates of a recurrent module), each masked and guarded by
itself. torch's own operations multiply with the masked weights. The node's backward runs when the
dense gradients G = dL/d(W * M) of all of them have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, compress

import torch
from torch import Tensor

from ..backends import implementation
from ..ops import call, is_batched, masked_weight_backward, without_autograd_and_autocast
from ..ops.autocast import device_type_of
from ._function import once_differentiable, refuse_tangents
from .options import MaskOptions


def pack_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    options: Sequence[MaskOptions],
    commit: Sequence[bool],
    dtype: torch.dtype,
    matrices: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Return every W * M in `dtype`, and the effective thresholds of every matrix.

    The weights are on one device, all float64 or none, with one backend; everything is outside
    autograd. Where `commit` says so, a reset by the guard is also written into the threshold.
    `matrices` says how many of them each weight stacks (None: one); then `out` holds contiguous
    tensors to write W * M into.
    """
    function = _function("masked_weights", options[0].backend, weights)
    with without_autograd_and_autocast(device_type_of(weights[0])):
        masked, effective = function(
            _split(weights, matrices),
            _split(thresholds, matrices),
            _repeat([each.reset_ratio for each in options], matrices),
            _repeat(commit, matrices),
            dtype,
            *([] if out is None else [_split(out, matrices)]),
        )
    committed = thresholds if all(commit) else [*compress(thresholds, commit)]
    if committed:
        torch.autograd.graph.increment_version(committed)
    return masked if out is None else out, effective


class _MaskWeights(torch.autograd.Function):
    """Attach masked weights and `copies` to their weights, thresholds and `copied` tensors."""

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def forward(ctx, masked, copies, effective, rest, *parameters):
        ctx.set_materialize_grads(False)
        ctx.rest = rest
        n = len(masked)
        ctx.threshold_shapes = [] if rest[1] is None else [t.shape for t in parameters[n : 2 * n]]
        ctx.save_for_backward(*parameters[:n], *effective)
        return *masked, *copies

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        options, matrices, in_backward = ctx.rest
        if in_backward is not None:
            in_backward()
        n, saved, needed = len(options), ctx.saved_tensors, ctx.needs_input_grad[4:]
        weights, effective, incoming = saved[:n], saved[n:], grads[:n]
        if n and all(needed[: 2 * n]) and all([grad is not None for grad in incoming]):
            made = _gradients(incoming, weights, effective, options, matrices, ctx.threshold_shapes)
            return None, None, None, None, *made[0], *made[1], *grads[n:]
        wanted = [i for i in range(n) if grads[i] is not None and (needed[i] or needed[n + i])]
        results: list[Tensor | None] = [None] * (2 * n)
        if wanted:
            every = [1] * n if matrices is None else matrices
            ends = [*accumulate(every)]
            made = _gradients(
                [grads[i] for i in wanted],
                [weights[i] for i in wanted],
                [t for i in wanted for t in effective[ends[i] - every[i] : ends[i]]],
                [options[i] for i in wanted],
                None if matrices is None else [matrices[i] for i in wanted],
                [] if matrices is None else [ctx.threshold_shapes[i] for i in wanted],
            )
            for i, of_weight, of_threshold in zip(wanted, *made, strict=True):
                results[i] = of_weight if needed[i] else None
                results[n + i] = of_threshold if needed[n + i] else None
        return None, None, None, None, *results, *grads[n:]  # autograd casts those of copies


def _gradients(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    effective: Sequence[Tensor],
    options: Sequence[MaskOptions],
    matrices: Sequence[int] | None,
    threshold_shapes: Sequence[torch.Size],
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return every dW and every dt from the gradients of W * M."""
    backend = options[0].backend
    arguments = (
        _split(grads, matrices),
        _split(weights, matrices),
        effective,
        _repeat([each.surrogate for each in options], matrices),
        _repeat([each.structure_gradient for each in options], matrices),
    )
    if is_batched(grads[0]):
        each = zip(*arguments, strict=True)
        found = [call(masked_weight_backward, *matrix, backend) for matrix in each]
        of_weights, of_thresholds = (_join(each, matrices) for each in zip(*found, strict=True))
        return of_weights, of_thresholds
    function = _function("masked_weights_backward", backend, weights)
    with without_autograd_and_autocast(device_type_of(weights[0])):
        if matrices is None:
            return function(*arguments)
        made = (
            [torch.empty_like(weight) for weight in weights],
            [effective[0].new_empty(shape) for shape in threshold_shapes],
        )
        function(*arguments, [_split(each, matrices) for each in made])
        return made


def mask_weights(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    options: Sequence[MaskOptions],
    commit: Sequence[bool],
    dtype: torch.dtype,
    *,
    matrices: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
    copied: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    in_backward: Callable[[], None] | None = None,
) -> Sequence[Tensor]:
    """Return every W * M, as `pack_weights` does, with gradients to weights and thresholds.

    The tensors `copied` are written into `copies`, cast to their dtype; `copies` are returned after
    the masked weights, with gradients to `copied`. The backward pass first calls `in_backward`.
    """
    made: tuple[Sequence[Tensor], Sequence[Tensor]] = (
        pack_weights(weights, thresholds, options, commit, dtype, matrices, out)
        if weights
        else ((), ())
    )
    if copied:
        with without_autograd_and_autocast(copied[0].device.type):
            torch._foreach_copy_(list(copies), list(copied))
    return _MaskWeights.apply(
        made[0], copies, made[1], (options, matrices, in_backward), *weights, *thresholds, *copied
    )


class _WithDenseGradients(torch.autograd.Function):
    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def forward(ctx, masked, *parameters):
        ctx.set_materialize_grads(False)
        ctx.weights, ctx.others = parameters[: len(masked)], len(parameters) - len(masked)
        return tuple([each.detach() for each in masked])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        for weight, grad in zip(ctx.weights, grads, strict=True):
            so_far = weight.grad
            if so_far is not None and grad is not None and so_far.dtype != weight.dtype:
                # Sum over micro-batches in the weight's dtype, as torch does everywhere.
                weight.grad = None
                weight.grad_dtype = weight.dtype
                weight.grad = so_far.to(weight.dtype)
        return None, *grads, *[None] * ctx.others


def with_dense_gradients(
    masked: Sequence[Tensor], weights: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return `masked`, attached to the weights by the identity: their gradient is G itself.

    Thresholds are inputs without a gradient: DDP, which waits for every parameter, needs them.
    """
    return _WithDenseGradients.apply(masked, *weights, *thresholds)


def _function(op: str, backend: str, weights: Sequence[Tensor]) -> Callable:
    double = weights[0].dtype is torch.float64
    return implementation(backend, weights[0].device, op, double=double)


def _split(tensors: Sequence[Tensor], matrices: Sequence[int] | None) -> Sequence[Tensor]:
    """Return what belongs to every matrix, as views; the tensors themselves without `matrices`."""
    if matrices is None:
        return tensors
    pairs = zip(tensors, matrices, strict=True)
    return [part for tensor, count in pairs for part in tensor.chunk(count)]


def _join(tensors: Sequence[Tensor], matrices: Sequence[int] | None) -> Sequence[Tensor]:
    """Undo `_split`."""
    if matrices is None:
        return tensors
    rest = iter(tensors)
    return [torch.cat([next(rest) for _ in range(count)]) for count in matrices]


def _repeat(values: Sequence, matrices: Sequence[int] | None) -> Sequence:
    if matrices is None:
        return values
    return [value for value, count in zip(values, matrices, strict=True) for _ in range(count)]
