"""Let accelerate clip what the step of a DST optimizer will use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .common import deferred


def install_clipping_(accelerator: Any, optimizer: Any) -> None:
    """Let `accelerator.clip_grad_norm_` clip the gradients that the step of `optimizer` will use.

    Until the step of DSTSGD or DSTAdamW, `.grad` of a masked weight holds the dense gradient, and
    accelerate would clip that. Nothing changes for other optimizers, prepared or not. Call it once,
    after `accelerator.prepare`.

    Then `accelerator.clip_grad_norm_` raises ValueError if it gets only some of the optimizer's
    parameters, others together with them, or another norm than the 2-norm;
    `accelerator.clip_grad_value_` raises it for any parameter of the optimizer.
    """
    own = deferred(optimizer)
    if own is None:
        return
    by_norm, by_value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_

    def split(parameters: Iterable[Tensor]) -> tuple[list[Tensor], bool, bool]:
        """Return all parameters, whether some are the optimizer's, and whether just these are."""
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        mine = {id(p) for group in own.param_groups for p in group["params"]}
        others = [p for p in given if id(p) not in mine]
        all_of_them = mine <= {id(p) for p in given} and all(p.grad is None for p in others)
        return given, len(others) < len(given), all_of_them

    def clip_grad_norm_(parameters, max_norm, norm_type=2):
        given, some, just_these = split(parameters)
        if not some:
            return by_norm(given, max_norm, norm_type)
        if not just_these or norm_type != 2:
            raise ValueError(
                f"parameters: a {type(own).__name__} clips all its parameters at once, without "
                f"others, and by their 2-norm, but norm_type is {norm_type}, or they differ"
            )
        accelerator.unscale_gradients()
        return own.grad_norm() if math.isinf(max_norm) else own.clip_grad_norm_(max_norm)

    def clip_grad_value_(parameters, clip_value):
        given, some, _ = split(parameters)
        if some:
            raise ValueError(
                f"parameters: a {type(own).__name__} makes the gradients of masked weights in its "
                "step, where they cannot be clipped by value: clip by norm, or use torch.optim"
            )
        return by_value(given, clip_value)

    accelerator.clip_grad_norm_ = clip_grad_norm_
    accelerator.clip_grad_value_ = clip_grad_value_
