"""Compute the sparse regulariser as one autograd node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import implementation
from ..ops import is_watched
from ..reference import regularization
from ._function import MaskedFunction


class _SparseRegularization(MaskedFunction):
    """Compute the sum in one node; plain autograd makes a dozen, and one more for each layer."""

    @staticmethod
    def compute(*thresholds):
        if is_watched():
            return regularization(thresholds)
        first = thresholds[0]
        double = any(threshold.dtype == torch.float64 for threshold in thresholds)
        return implementation("auto", first.device, "regularization", double=double)(thresholds)

    @staticmethod
    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.like = [(threshold.shape, threshold.dtype) for threshold in inputs]

    @staticmethod
    def gradients(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        parts = (grad * slope).split([shape.numel() for shape, _ in ctx.like])
        return tuple(
            part.reshape(shape).to(dtype)
            for part, (shape, dtype) in zip(parts, ctx.like, strict=True)
        )


def sparse_regularization(thresholds: Sequence[Tensor]) -> Tensor:
    """Return the sum of exp(-t) over all elements of tensors on one device."""
    return _SparseRegularization.apply(*thresholds)[0]
