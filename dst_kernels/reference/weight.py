"""Compute the mask, the masked weight and the gradients of weight and threshold, without a matmul.

Definitions (Liu et al., "Dynamic Sparse Training", ICLR 2020): margin Q = |W| - t, mask M = 1 where
Q > 0, and with G = dL/d(W * M), H the surrogate derivative:

    dW = G * M + G * |W| * H(Q)          the second term is the structure gradient, optional
    dt = -sum(G * W * H(Q))              over the weights that the threshold governs

A diverged gradient is never hidden: a G that is NaN or infinite reaches dW where the weight is kept
(and, by the structure gradient, where it is pruned) and dt wherever it is, as 0 * NaN is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .surrogate import times_surrogate_


def broadcast_threshold(threshold: Tensor, weight: Tensor) -> Tensor:
    """View `threshold` so that it broadcasts against `weight`.

    The result always has the weight's rank: a 0-dim tensor would not take part in dtype promotion,
    and a bf16 weight would be compared with a bf16-rounded threshold.
    """
    if threshold.shape == weight.shape:
        return threshold
    return threshold.reshape(-1, *[1] * (weight.dim() - 1))


def threshold_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return the boolean mask of kept weights. NaN counts as kept: only Q <= 0 prunes."""
    return ~(weight.abs() <= broadcast_threshold(threshold, weight))


def largest_collapsed_count(numel: int, reset_ratio: float) -> int:
    """Return the largest number of kept weights with `count / numel <= reset_ratio`.

    The guard then is one exact comparison of integers on the device, for weights of any size.
    """
    count = int(reset_ratio * numel)
    while count / numel > reset_ratio:
        count -= 1
    while count < numel and (count + 1) / numel <= reset_ratio:
        count += 1
    return count


def effective_threshold(weight: Tensor, threshold: Tensor, reset_ratio: float | None) -> Tensor:
    """Return `threshold`, or zeros if at most the share `reset_ratio` of the weights would remain.

    The device decides, without a synchronisation. The result is always a new tensor, so that a
    later write to `threshold` (a committed reset, an optimizer step) does not change it.
    """
    if reset_ratio is None or weight.numel() == 0:
        return threshold.clone()
    pruned = weight.abs().le_(broadcast_threshold(threshold, weight))  # 0 or 1, in W's dtype
    exact = torch.promote_types(pruned.dtype, torch.float32)
    if exact is torch.float32 and weight.numel() > 2**24:
        exact = torch.int64
    kept = weight.numel() - pruned.sum(dtype=exact)
    collapsed = kept <= largest_collapsed_count(weight.numel(), reset_ratio)
    return threshold.clone().masked_fill_(collapsed, 0)


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    reset_ratio: float | None,
    dtype: torch.dtype,
    commit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (W * M in `dtype`, with the weight's memory format; effective threshold).

    A NaN in W or t gives NaN. `commit`: the effective threshold is also written into `threshold`.
    """
    effective = effective_threshold(weight, threshold, reset_ratio)
    if commit:
        threshold.copy_(effective)
    return _times_mask(weight, effective, dtype), effective


def _times_mask(weight: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    threshold = broadcast_threshold(threshold, weight)
    mask = weight.abs().gt_(threshold)
    # W * 0 keeps a NaN weight visible. A NaN threshold prunes its whole row, and the summand,
    # zero for every other threshold, turns that row into NaN.
    nan_or_zero = threshold.clamp(0, 0).to(weight.dtype)
    masked = torch.addcmul(nan_or_zero, weight, mask, out=mask)
    return masked.to(dtype)


def recorded_masked_weight(
    weight: Tensor, threshold: Tensor, reset_ratio: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what `masked_weight` does, without a gradient and without writing to any tensor.

    For tools that record the operations of a forward in evaluation, such as exporters.
    """
    weight, threshold = weight.detach(), threshold.detach()
    effective, numel = threshold, int(weight.numel())
    if reset_ratio is not None and numel > 0:
        pruned = weight.abs() <= broadcast_threshold(threshold, weight)
        collapsed = numel - pruned.sum() <= largest_collapsed_count(numel, reset_ratio)
        effective = torch.where(collapsed, torch.zeros_like(threshold), threshold)
    limit = broadcast_threshold(effective, weight)
    nan_or_zero = limit.clamp(0, 0).to(weight.dtype)  # as in `_times_mask`
    return (nan_or_zero + weight * (weight.abs() > limit)).to(dtype), effective


def masked_weight_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return (dW, dt) from G = `grad`, computed in at least fp32, in the parameters' dtypes."""
    return weight_gradients_(grad.clone(), weight, threshold, surrogate, structure_gradient)


def weight_gradients_(
    dense: Tensor, weight: Tensor, threshold: Tensor, surrogate: str, structure_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return what `masked_weight_backward` does, but overwrite G = `dense`."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, threshold.dtype), torch.float32)
    dense = dense.to(dtype)
    w = weight.to(dtype)
    margin = w.abs().sub_(broadcast_threshold(threshold, weight))

    grad_weight = torch.empty_like(weight, dtype=dtype)
    # Zero where the margin is <= 0, else G: a `where` that is vectorised on every device.
    torch.ops.aten.threshold_backward.grad_input(dense, margin, 0, grad_input=grad_weight)
    through_mask = times_surrogate_(dense, margin, surrogate)
    if structure_gradient:
        magnitude = torch.abs(w, out=margin)
        grad_weight.addcmul_(through_mask, magnitude)

    grad_threshold = through_mask.mul_(w)
    if threshold.shape != weight.shape:
        summed = range(weight.dim()) if threshold.numel() == 1 else range(1, weight.dim())
        grad_threshold = grad_threshold.sum(tuple(summed)).reshape(threshold.shape)
    return grad_weight.to(weight.dtype), _like(grad_threshold.neg_(), threshold)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor` with the dtype and strides of `other`."""
    if tensor.dtype == other.dtype and tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other).copy_(tensor)
