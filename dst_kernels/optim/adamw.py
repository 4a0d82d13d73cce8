"""Offer AdamW that computes the gradients of masked weights and thresholds in its step."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import require, require_number
from .deferred import DeferredOptimizer
from .target import TargetRatio


class DSTAdamW(DeferredOptimizer):
    """Optimize a model with masked layers as `torch.optim.AdamW`, with dW and dt made in the step.

    See `DSTSGD` for what that means, and for `model`, `params`, `alpha`, `bucket_mb`, `backend`
    and the errors raised. `lr`, `betas`, `eps`, `weight_decay` and `maximize` are those of
    `torch.optim.AdamW`; there is no amsgrad. Steps are counted on the device, so a CUDA graph can
    capture the step without further options. The state dict is interchangeable with that of
    `torch.optim.AdamW` over the same groups.
    """

    _op, _kinds = "adamw_step_", 3

    def __init__(
        self,
        model: nn.Module,
        params: Iterable | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        alpha: float | Tensor | TargetRatio | None = None,
        maximize: bool = False,
        bucket_mb: float = 25,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "maximize": maximize, "alpha": alpha,
        }  # fmt: skip
        self._check(defaults)
        super().__init__(model, params, defaults, bucket_mb, backend)

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict that `torch.optim.AdamW` can load, too."""
        state_dict = super().state_dict()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            # With it, torch.optim also keeps the step counts on the GPU after loading.
            saved["capturable"] = any(p.is_cuda for p in group["params"])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
                state["step"] = step

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        require_number("eps", group["eps"])
        betas = group["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        pair = pair and all(isinstance(beta, Real) for beta in betas)
        require(pair, "betas", "two numbers in [0, 1)", betas)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), but are {betas}")
        if group.get("amsgrad"):
            raise ValueError("amsgrad is not supported")
        if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                "weight decay is decoupled here (AdamW), but this state is of an optimizer that "
                "adds it to the gradient (Adam)"
            )

    def _rule(self, group: dict[str, Any]) -> tuple[float, float, float]:
        return *group["betas"], group["eps"]

    def _state_of(self, parameter: Tensor, row: int) -> tuple[list[Tensor], bool]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        names = "exp_avg", "exp_avg_sq"
        averages = [self._like_parameter(parameter, name) for name in names]
        return [*averages, state["step"]], False
