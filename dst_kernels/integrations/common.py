"""Offer what every framework needs: checks before training, the regulariser's gradient, logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require_number
from ..model import remaining_ratio, sparse_regularization
from ..model.check import thresholds_without_optimizer
from ..nn.find import named_masked_weights
from ..optim import TargetRatio
from ..optim.deferred import DeferredOptimizer

Alpha: TypeAlias = "float | TargetRatio | None"


def check_training(model: nn.Module, optimizers: Sequence[Any], alpha: Alpha, owner: str) -> None:
    """Raise ValueError if training would go wrong silently; let a TargetRatio count the steps.

    It would without masked layers, without a regulariser or with two, with thresholds that no
    optimizer trains, and with weight decay on a group that has both weights and thresholds.
    """
    named = named_masked_weights(model)
    groups = [group for each in optimizers for group in each.param_groups]
    lost = thresholds_without_optimizer(named, optimizers)
    if lost:
        raise ValueError(
            f"optimizer: it does not train the threshold of {lost[0]} ({len(lost)} such): "
            "build it after sparsify_"
        )
    thresholds = {id(part.threshold) for _, part in named}
    for group in groups:
        inside = sum(id(p) in thresholds for p in group["params"])
        if group.get("weight_decay") and 0 < inside < len(group["params"]):
            raise ValueError(
                f"optimizer: its weight_decay {group['weight_decay']} reaches {inside} thresholds: "
                "build it from dst_kernels.parameter_groups(model, ...), or give the thresholds a "
                "param group of their own"
            )
    if alpha and all(part.frozen or not part.threshold.requires_grad for _, part in named):
        raise ValueError(
            f"alpha: every threshold is frozen, so it changes nothing: give the {owner} alpha=0"
        )
    in_optimizer = any(group.get("alpha") is not None for group in groups)
    if alpha is not None and in_optimizer:
        raise ValueError(f"alpha: the optimizer has one already; give it to that or to the {owner}")
    if alpha is None and not in_optimizer:
        raise ValueError(
            f"alpha: nothing adds the regulariser: give alpha to the {owner} or to a DST optimizer "
            "(0 for none)"
        )
    if isinstance(alpha, TargetRatio):
        alpha.follow(optimizers[0])


def check_alpha(alpha: Alpha) -> None:
    """Raise an error unless it is a TargetRatio, a finite number of at least 0, or None."""
    if alpha is not None and not isinstance(alpha, TargetRatio):
        require_number("alpha", alpha)


def add_regularization_(model: nn.Module, optimizer: Any, alpha: Alpha, scaler: Any = None) -> None:
    """Add the gradient of alpha * R to the thresholds of `optimizer`, once for its next step.

    Call it after the last backward of a step: then it does not matter how losses are accumulated,
    averaged or normalised, and R is computed after the guard's resets. `scaler` is a GradScaler
    whose factor the gradients still have.
    """
    if not alpha:
        return
    known = {id(part.threshold) for _, part in named_masked_weights(model) if not part.frozen}
    thresholds = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in known and p.requires_grad
    ]
    if not thresholds:
        return
    with torch.enable_grad():
        factor = alpha.alpha if isinstance(alpha, TargetRatio) else alpha
        loss = factor * sparse_regularization(model)
        loss = loss if scaler is None else scaler.scale(loss)
        grads = torch.autograd.grad(loss, thresholds, allow_unused=True)
    for threshold, grad in zip(thresholds, grads, strict=True):
        if grad is not None:
            threshold.grad = grad if threshold.grad is None else threshold.grad + grad


def deferred(optimizer: Any) -> DeferredOptimizer | None:
    """Return the DSTSGD or DSTAdamW inside the wrappers of frameworks, or None."""
    while not isinstance(optimizer, DeferredOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            inner = getattr(optimizer, "_optimizer", None)
        if not isinstance(inner, Optimizer):
            return None
        optimizer = inner
    return optimizer


@torch.no_grad()
def figures(model: nn.Module) -> dict[str, Tensor]:
    """Return the values to log, without a synchronisation."""
    return {
        "remaining_ratio": remaining_ratio(model),
        "sparse_regularization": sparse_regularization(model),
    }
