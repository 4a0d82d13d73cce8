"""Compute the deferred optimizer step: new weights, thresholds and W * M from dense gradients G.

All that happens to gradients between backward and step (sums over micro-batches and ranks,
unscaling) is linear in G = dL/d(W * M), and dW and dt are linear in G, with coefficients that
depend on W and t alone. So they can be computed once, inside the step that uses them.

All functions take lists with one entry per *segment*; a tensor without elements means "absent", and
so does an empty list for all of `threshold_grads`, `rates`, `alphas` or `scales`. A segment with a
threshold (one per row) is a masked weight, one without is any other parameter.
`settings` has SETTINGS integers per segment, `hypers` (float64 [h, HYPERS] on the CPU) one row of
numbers for the weights and one for the thresholds of each param group:

    settings   row of hypers for the weight (-1: it is not updated), and for the threshold;
               surrogate (index into SURROGATES); structure gradient; largest kept count at which
               the guard resets (-1: none); whether it is the first step of weight, of threshold
    hypers     lr, weight decay, maximize, has alpha, alpha; then momentum, dampening, nesterov for
               SGD and beta1, beta2, eps for AdamW
    rates      one-element tensors that replace lr; alphas: tensors that replace alpha
    scales     [grad_scale, found_inf, clip]: gradients are divided by the first, the step is
               skipped if the second is 1, and the third multiplies the final gradients

Thresholds are effective ones on entry and on exit: a reset by the guard is written into them.
`masked` may be three times as long, with columns and places of each segment behind it: where these
are given (on CPUs), W * M is written as kept rows (`kept.py`), whose values `masked` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kept import kept_rows
from .regularization import sparse_regularization_and_slope
from .surrogate import SURROGATES
from .weight import broadcast_threshold, masked_weight, weight_gradients_
from .wide import wide_dtype

SETTINGS, HYPERS = 7, 8
Tensors = Sequence[Tensor]


def sgd_step_(
    weights: Tensors, grads: Tensors, buffers: Tensors,
    thresholds: Tensors, threshold_grads: Tensors, threshold_buffers: Tensors,
    masked: Tensors, kept: Tensor, *how: Any,
) -> None:  # fmt: skip
    """Update as `torch.optim.SGD` does; without momentum the buffers are absent.

    `how`: settings, hypers, rates, alphas and scales, as above.
    """
    run, threshold_grads = _Run(*how), _filled(threshold_grads, len(weights))
    for i, weight in enumerate(weights):
        *_, first_weight, first_threshold = run.settings(i)
        run.segment(
            i, weight, grads[i], thresholds[i], threshold_grads[i], masked[i :: len(weights)], kept,
            lambda p, g, h, i=i, first=first_weight: run.sgd(p, g, buffers[i], first, h),
            lambda p, g, h, i=i, first=first_threshold: run.sgd(
                p, g, threshold_buffers[i], first, h
            ),
        )  # fmt: skip


def adamw_step_(
    weights: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, steps: Tensors,
    thresholds: Tensors, threshold_grads: Tensors,
    threshold_averages: Tensors, threshold_squares: Tensors, threshold_steps: Tensors,
    masked: Tensors, kept: Tensor, *how: Any,
) -> None:  # fmt: skip
    """Update as `torch.optim.AdamW` does, and count `steps`, one-element float32 tensors.

    `how`: settings, hypers, rates, alphas and scales, as above.
    """
    run, threshold_grads = _Run(*how), _filled(threshold_grads, len(weights))
    for i, weight in enumerate(weights):
        of_weight = averages[i], squares[i], steps[i]
        of_threshold = threshold_averages[i], threshold_squares[i], threshold_steps[i]
        run.segment(
            i, weight, grads[i], thresholds[i], threshold_grads[i], masked[i :: len(weights)], kept,
            lambda p, g, h, state=of_weight: run.adamw(p, g, state, h),
            lambda p, g, h, state=of_threshold: run.adamw(p, g, state, h),
        )  # fmt: skip


def grad_norm_(
    weights: Tensors, grads: Tensors, thresholds: Tensors, threshold_grads: Tensors,
    settings: Sequence[int], hypers: Tensor, alphas: Tensors, scales: Tensors, norm: Tensor,
) -> None:  # fmt: skip
    """Write the norm of all final gradients before clipping, dW and dt among them, into `norm`."""
    run = _Run(settings, hypers, [], alphas, scales[:2])
    threshold_grads = _filled(threshold_grads, len(weights))
    squares = []
    for i, weight in enumerate(weights):
        pair = run.gradients(i, weight, grads[i], thresholds[i], threshold_grads[i])
        squares += [
            grad.to(wide_dtype(grad.device)).square().sum() for grad in pair if grad is not None
        ]
    total = torch.stack(squares).sum() if squares else torch.zeros_like(norm)
    norm.copy_(total.sqrt().reshape(norm.shape))


class _Hyper(NamedTuple):
    """Hold a row of hypers; the meaning of `rest` depends on the update rule."""

    lr: float | Tensor
    weight_decay: float
    maximize: bool
    alpha: float | Tensor | None
    rest: tuple[float, float, float]


class _Run:
    """Hold what all segments of one call share, and update one segment at a time."""

    def __init__(
        self, settings: Sequence[int], hypers: Tensor, rates: Tensors, alphas: Tensors,
        scales: Tensors,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._hypers = []
        numbers = hypers.tolist()
        tensors = _filled(rates, len(numbers)), _filled(alphas, len(numbers))
        rows = zip(numbers, *tensors, strict=True)
        for (lr, weight_decay, maximize, has_alpha, alpha, *rest), rate, tensor in rows:
            alpha = (tensor if tensor.numel() else alpha) if has_alpha else None
            lr = rate if rate.numel() else lr
            self._hypers.append(_Hyper(lr, weight_decay, bool(maximize), alpha, tuple(rest)))
        given = [scale if scale.numel() else None for scale in _filled(scales, 3)]
        self._grad_scale, self._found_inf, self._clip = (*given, None)[:3]

    def settings(self, i: int) -> Sequence[int]:
        """Return the SETTINGS integers of segment `i`."""
        return self._settings[i * SETTINGS : (i + 1) * SETTINGS]

    def _hyper(self, row: int) -> _Hyper | None:
        return None if row < 0 else self._hypers[row]

    def gradients(
        self, i: int, weight: Tensor, grad: Tensor, threshold: Tensor, threshold_grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the final gradients of weight and threshold, None for one that is not updated."""
        weight_row, threshold_row, surrogate, structure, *_ = self.settings(i)
        of_weight = of_threshold = None
        if grad.numel():
            of_weight = self._unscaled(grad, weight)
            if threshold.numel():
                real = of_weight.dtype
                of_weight, of_threshold = weight_gradients_(
                    of_weight, weight.to(real), threshold.to(real),
                    SURROGATES[surrogate], bool(structure),
                )  # fmt: skip
        if threshold.numel():
            if threshold_grad.numel():
                of_threshold = _plus(of_threshold, self._unscaled(threshold_grad, weight))
            of_threshold = self._final(of_threshold, threshold, self._hyper(threshold_row))
            of_weight = self._final(of_weight, weight, None)
        else:
            of_weight = self._final(of_weight, weight, self._hyper(weight_row))
        return (
            None if weight_row < 0 else of_weight,
            None if threshold_row < 0 else of_threshold,
        )

    def _unscaled(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient without the loss scale, as a new tensor in the step's dtype."""
        grad = grad.to(_arithmetic(weight), copy=True)
        return grad if self._grad_scale is None else grad / self._grad_scale

    def _final(self, grad: Tensor | None, parameter: Tensor, hyper: _Hyper | None) -> Tensor | None:
        """Return the gradient plus that of the regulariser, clipped."""
        if hyper is not None and hyper.alpha is not None:
            slope = sparse_regularization_and_slope(parameter)[1]
            grad = _plus(grad, hyper.alpha * slope)
        return grad if grad is None or self._clip is None else grad * self._clip

    def segment(
        self, i: int, weight: Tensor, grad: Tensor, threshold: Tensor, threshold_grad: Tensor,
        masked: Tensors, kept: Tensor, update_weight: Callable, update_threshold: Callable,
    ) -> None:  # fmt: skip
        """Update threshold and weight of segment `i`, then its W * M; the rule is the caller's."""
        weight_row, threshold_row, _, _, collapsed, *_ = self.settings(i)
        of_weight, of_threshold = self.gradients(i, weight, grad, threshold, threshold_grad)
        if of_threshold is not None:
            update_threshold(threshold, of_threshold, self._hyper(threshold_row))
        if of_weight is not None:
            update_weight(weight, of_weight, self._hyper(weight_row))
        if masked[0].numel():
            self._mask(weight, threshold, masked, kept[i], collapsed)

    def _mask(
        self, weight: Tensor, threshold: Tensor, masked: Tensors, kept: Tensor, collapsed: int
    ) -> None:
        """Write W * M under the new threshold, which is 0 where the layer has collapsed."""
        values, *rows = masked
        count = _kept(weight, threshold)
        effective = torch.where(count <= collapsed, torch.zeros_like(threshold), threshold)
        made = masked_weight(weight, effective, None, values.dtype)[0]
        if rows and rows[0].numel():
            found = kept_rows(made, made.numel()) or ()
            for target, value in zip((values, *rows), found, strict=True):
                self._write(target, value)
        else:
            self._write(values, made)
        self._write(kept, _kept(weight, effective))
        self._write(threshold, effective)

    def _write(self, target: Tensor, value: Tensor) -> None:
        """Write `value` into `target` unless the step is skipped; the device decides."""
        value = value.to(target.dtype).reshape(target.shape)
        if self._found_inf is not None:
            value = torch.where(self._found_inf.reshape(()) == 1, target, value)
        target.copy_(value)

    def sgd(self, parameter: Tensor, grad: Tensor, buffer: Tensor, first: int, h: _Hyper) -> None:
        """Apply SGD with momentum, as in torch: a first step has no dampening."""
        momentum, dampening, nesterov = h.rest
        grad = -grad if h.maximize else grad
        old = parameter.to(grad.dtype)
        grad = grad + h.weight_decay * old
        if momentum:
            new = grad if first else momentum * buffer + (1 - dampening) * grad
            self._write(buffer, new)
            grad = grad + momentum * new if nesterov else new
        self._write(parameter, old - h.lr * grad)

    def adamw(
        self, parameter: Tensor, grad: Tensor, state: tuple[Tensor, Tensor, Tensor], h: _Hyper
    ) -> None:
        """Apply AdamW (Loshchilov & Hutter, ICLR 2019); `state`: both averages and the count."""
        average, square, step = state
        beta1, beta2, eps = h.rest
        grad = -grad if h.maximize else grad
        real = grad.dtype
        count = (step.reshape(()) + 1).to(wide_dtype(step.device))
        new = parameter.to(real) * (1 - h.lr * h.weight_decay)
        first = average.to(real).lerp(grad, 1 - beta1)
        second = beta2 * square.to(real) + (1 - beta2) * grad.square()
        step_size = h.lr / _bias_correction(beta1, count)
        root = _bias_correction(beta2, count).sqrt()
        new = new - step_size * first / (second.sqrt() / root + eps)
        for target, value in (
            (step, count), (average, first), (square, second), (parameter, new),
        ):  # fmt: skip
            self._write(target, value)


def _filled(tensors: Tensors, count: int) -> Tensors:
    """Return `count` absent tensors for an empty list, and other lists unchanged."""
    return tensors or [torch.empty(0)] * count


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """Return 1 - beta^count, which has a relative error of 5e-5 in float32 as it is written."""
    if count.dtype is torch.float64 or beta == 0:
        return 1 - beta**count
    return -torch.expm1(math.log(beta) * count)


def _arithmetic(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _plus(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other.reshape(one.shape)


def _kept(weight: Tensor, threshold: Tensor) -> Tensor:
    return (~(weight.abs() <= broadcast_threshold(threshold, weight))).sum()
