"""The masked weight with its gradients, and packing: the same without any."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_surrogate
from ._function import MaskedFunction, wanted

__all__ = ["Packed", "masked_weight", "pack"]


class Packed(NamedTuple):
    """W * M in the compute dtype, and the effective threshold that made it; no gradients."""

    masked: Tensor
    effective: Tensor


def pack(
    weight: Tensor,
    threshold: Tensor,
    reset_ratio: float | None,
    dtype: torch.dtype,
    backend: str,
) -> Packed:
    """Mask and cast in one pass, outside autograd."""
    arguments = weight.detach(), threshold.detach(), reset_ratio, dtype, backend
    return Packed(*ops.call(ops.masked_weight, *arguments))


class _MaskedWeight(MaskedFunction):
    @staticmethod
    def compute(weight, threshold, reset_ratio, dtype, surrogate, structure_gradient, backend):
        return ops.call(ops.masked_weight, weight, threshold, reset_ratio, dtype, backend)

    @staticmethod
    def save(ctx, inputs, output):
        weight, _, _, _, *options = inputs
        _, effective = output
        ctx.options = options
        ctx.mark_non_differentiable(effective)
        ctx.save_for_backward(weight, effective)

    @staticmethod
    def gradients(ctx, grad, *_):
        weight, effective = ctx.saved_tensors
        grads = ops.call(ops.masked_weight_backward, grad, weight, effective, *ctx.options)
        return *wanted(ctx, 0, grads), None, None, None, None, None


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    *,
    reset_ratio: float | None,
    dtype: torch.dtype | None,
    surrogate: str,
    structure_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(W * M, effective threshold), the first with gradients to `weight` and `threshold`."""
    check_surrogate(surrogate)
    dtype = weight.dtype if dtype is None else dtype
    return _MaskedWeight.apply(
        weight, threshold, reset_ratio, dtype, surrogate, structure_gradient, backend
    )
