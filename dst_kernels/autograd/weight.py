"""Mask one weight, with its gradients, or without any (`pack`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_masked_weight
from ._function import MaskedFunction
from .options import MaskOptions

if TYPE_CHECKING:
    from .fixed import FixedMask


class Packed(NamedTuple):
    """Hold W * M in the compute dtype, and the effective threshold that made it.

    The stored threshold itself, in place of the latter, has its values already.
    """

    masked: Tensor
    effective: Tensor


class WeightSource(NamedTuple):
    """Say where the W * M of one call comes from, and what becomes of its gradient.

    Args:
        recall: is called in place of `pack` and may return an earlier result; None: `pack`. While
            a compiler traces, it may return None, where the graph is to mask the weight.
        dense_gradient: the weight's gradient is G itself and the threshold has none, since an
            optimizer makes both from G.
        keep: whether W * M may be kept for the backward pass. FSDP2 frees the gathered weight
            until then to save memory; a kept copy would take that memory again.
        fixed: the mask is this one, and `recall` is its.
        commit: a reset by the guard may be written into the threshold at once. If it was, the
            threshold is returned in place of the effective one.
    """

    recall: Callable[[Tensor, Tensor, MaskOptions, torch.dtype], Packed | None] | None = None
    dense_gradient: bool = False
    keep: bool = True
    fixed: FixedMask | None = None
    commit: bool = False


FRESH = WeightSource()
COMMITTED = WeightSource(commit=True)


def _cast(weight: Tensor, threshold: Tensor, options: MaskOptions, dtype: torch.dtype) -> Packed:
    return Packed(weight.to(dtype), threshold)


MADE = WeightSource(_cast)  # the weight is W * M already, with gradients of its own


def pack(
    weight: Tensor,
    threshold: Tensor,
    options: MaskOptions,
    dtype: torch.dtype,
    commit: bool = False,
) -> Packed:
    """Mask and cast in one pass, outside autograd; the caller has checked the arguments.

    `commit`: also write a reset by the guard into `threshold`, as `ops.can_commit` allows.
    """
    arguments = weight.detach(), threshold.detach(), options.reset_ratio, dtype, options.backend
    if commit:
        return Packed(*ops.commit_masked_weight(*arguments))
    return Packed(*ops.call(ops.masked_weight, *arguments))


class _MaskedWeight(MaskedFunction):
    """Return (W * M,) if `masked` was made before, else (W * M, effective)."""

    @staticmethod
    def compute(weight, threshold, masked, effective, how):
        if masked is not None:
            return (masked.detach(),)  # a new tensor, since autograd changes what is returned
        commit, reset_ratio, dtype, *_, backend = how
        if commit:
            return ops.commit_masked_weight(weight, threshold, reset_ratio, dtype, backend)
        return ops.call(ops.masked_weight, weight, threshold, reset_ratio, dtype, backend)

    @staticmethod
    def save(ctx, inputs, output):
        weight, _, masked, effective, how = inputs
        if masked is None:
            effective = output[1]
            ctx.mark_non_differentiable(effective)
        _, _, _, ctx.dense_gradient, *ctx.options = how
        if not ctx.dense_gradient:
            ctx.save_for_backward(weight, effective)

    @staticmethod
    def gradients(ctx, grad, *_):
        if ctx.dense_gradient:
            grads = grad, None
        else:
            weight, effective = ctx.saved_tensors
            arguments = grad, weight, effective, *ctx.options
            grads = ops.call(ops.masked_weight_backward, *arguments)
        of_weight, of_threshold, *_ = ctx.needs_input_grad
        return grads[0] if of_weight else None, grads[1] if of_threshold else None, None, None, None


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    options: MaskOptions,
    dtype: torch.dtype | None = None,
    source: WeightSource = FRESH,
    *,
    checked: bool = False,
) -> Packed:
    """Return W * M in `dtype` (None: the weight's), with gradients to `weight` and `threshold`.

    `checked`: the caller has checked the tensors. It has always checked the options.
    """
    dtype = weight.dtype if dtype is None else dtype
    if not checked and not torch.compiler.is_compiling():  # there the op's own check serves
        check_masked_weight(weight, threshold, options.reset_ratio, dtype)
    masked = effective = None
    if source.recall is not None:
        found = source.recall(weight, threshold, options, dtype)
        if found is not None:
            if source is MADE or source.fixed is not None:
                return found
            masked, effective = found
    commit = source.commit and ops.can_commit(weight, threshold)
    # One tuple, as each argument of a node costs the host time.
    how = (
        commit, options.reset_ratio, dtype, source.dense_gradient,
        options.surrogate, options.structure_gradient, options.backend,
    )  # fmt: skip
    saved = None if source.dense_gradient else effective
    outputs = _MaskedWeight.apply(weight, threshold, masked, saved, how)
    if commit:
        return Packed(outputs[0], threshold)
    return Packed(outputs[0], outputs[1] if effective is None else effective)
