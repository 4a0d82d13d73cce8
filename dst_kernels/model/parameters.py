"""Collect a model's thresholds for the loss and its parameters for the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..arguments import require_number
from ..nn.find import named_masked_weights


def sparse_regularization(model: nn.Module) -> Tensor:
    """Return the sum of exp(-t) over every threshold of the model, a 0-dim tensor.

    Add it to the loss times alpha. A threshold that layers share counts once; that of a frozen
    weight (`requires_grad` is False) counts, but gets no gradient; that of a fixed mask
    (`freeze_masks_`) does not count. See `functional.sparse_regularization` for very negative
    thresholds. Raises TypeError if `model` is no module, ValueError if it has no masked layers, and
    RuntimeError in the backward of a loss that contains the sum although an optimizer of
    `dst_kernels.optim` with an `alpha` adds the same gradient.
    """
    everything = [part for _, part in named_masked_weights(model)]
    parts = [part for part in everything if part.fixed_mask is None]
    if not parts:
        return torch.zeros((), device=everything[0].weight.device)
    trained = {id(part.threshold) for part in parts if not part.frozen}
    thresholds = {id(threshold): threshold for threshold in [part.threshold for part in parts]}
    value = F.sparse_regularization(
        [each if key in trained else each.detach() for key, each in thresholds.items()]
    )
    if value.requires_grad and not torch.compiler.is_compiling():
        deferrals = {getattr(part.module, "_deferral", None) for part in parts}
        if any(deferral is not None and deferral.regularizes for deferral in deferrals):
            value.register_hook(_refuse_to_count_twice)
    return value


def _refuse_to_count_twice(grad: Tensor) -> None:
    if grad.item() != 0:  # a loss may contain it times 0
        raise RuntimeError(
            "the regulariser counts twice: the loss contains sparse_regularization, and the "
            "optimizer adds its gradient as well, since it was given alpha; leave one of them out"
        )


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float | None = None,
    threshold_lr: float | None = None,
    threshold_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return two param groups for a torch optimizer: all parameters but thresholds, and thresholds.

    `lr` and `weight_decay` apply to the first (None: the optimizer's own),
    `threshold_lr` (None: `lr`) and `threshold_weight_decay` to the thresholds. Decay pulls
    thresholds towards 0: they stop where alpha * exp(-t) = decay * t. The default is no decay (the
    authors' CIFAR runs had it). Parameters that need no gradient are left out.

    Raises ValueError if the model has no masked layers or a number is negative or not finite,
    TypeError if `model` is no module or an option no number.
    """
    thresholds = _thresholds(model)
    given = {"lr": lr, "weight_decay": weight_decay, "threshold_lr": threshold_lr}
    for name, value in given.items():
        if value is not None and not (name.endswith("lr") and isinstance(value, Tensor)):
            require_number(name, value)
    require_number("threshold_weight_decay", threshold_weight_decay)
    groups = [
        _group(
            "weights",
            [p for p in model.parameters() if p.requires_grad and id(p) not in thresholds],
            lr,
            weight_decay,
        ),
        _group(
            "thresholds",
            [p for p in thresholds.values() if p.requires_grad],
            lr if threshold_lr is None else threshold_lr,
            threshold_weight_decay,
        ),
    ]
    return [group for group in groups if group["params"]]


def _thresholds(model: nn.Module) -> dict[int, Tensor]:
    """Return all thresholds by their id, shared ones once."""
    found = [part.threshold for _, part in named_masked_weights(model)]
    return {id(threshold): threshold for threshold in found}


def _group(
    name: str, params: list[Tensor], lr: float | None, weight_decay: float | None
) -> dict[str, Any]:
    """Return a param group without the options that are None."""
    options = {"lr": lr, "weight_decay": weight_decay}
    given = {key: value for key, value in options.items() if value is not None}
    return {"name": name, "params": params, **given}
