"""Offer STR: subtract a trained threshold of its layer from the size of each weight."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer

from ..arguments import require, require_number
from .method import Method


class SoftThreshold(nn.Module):
    """Compute sign(w) * relu(|w| - sigmoid(s)) from a weight w, with a trained number s."""

    def __init__(self, start: float, device: torch.device) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((), float(start), device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight's sparse form, in its shape and dtype."""
        return weight.sign() * (weight.abs() - self.s.sigmoid().to(weight.dtype)).relu()


class STR(Method):
    """Train with soft thresholds, one per layer, which weight decay drives up.

    Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020.

    Each layer computes with sign(w) * relu(|w| - sigmoid(s)). Unlike all other methods here, this
    one shrinks the weights that it keeps, by the threshold sigmoid(s). The number s begins far
    below 0, where the threshold is 0 to rounding; weight decay brings it nearer to 0, and the loss
    can push it back. With SGD and decay alone, s after n steps is near
    start * exp(-n * weight_decay * lr / (1 - momentum)); thresholds begin to prune around s = -7.

    The ratio cannot be asked for: it follows from `weight_decay`, and there is no `density`.

    The soft threshold is a parametrization of the modules' weights (torch.nn.utils.parametrize),
    so the state dict has `parametrizations.<name>.original` in place of the weight, and s. The
    optimizer gets a param group, "soft_thresholds", for s. The mask is where the weight that is
    computed is not 0: every step sets it. `finalize_` leaves plain layers with these weights.

    Known flaw: with the authors' values, for ImageNet, short trainings on other data stay dense.

    Args:
        model, optimizer, dense, seed: see `Method`; nothing here is random. `optimizer` is one of
            torch's.
        start: s at first; the authors' -3200 for ResNet-50.
        weight_decay: of s; the authors' 2.25e-5 (for 90.23 % sparsity), with a learning rate of
            0.256 that falls to 0, a momentum of 0.875 and 500,000 steps.

    Raises as `Method` does; ValueError for an optimizer without weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        start: float = -3200.0,
        weight_decay: float = 2.25e-5,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        number = isinstance(start, (int, float)) and not isinstance(start, bool)
        require(number, "start", "a negative number", start)
        require_number("-start", -start, positive=True)
        require_number("weight_decay", weight_decay)
        if isinstance(optimizer, Optimizer) and "weight_decay" not in optimizer.defaults:
            name = type(optimizer).__name__
            raise ValueError(f"optimizer ({name}) has no weight decay, which drives thresholds up")
        super().__init__(model, optimizer, dense=dense, seed=seed)
        soft = [SoftThreshold(start, layer.weight.device) for layer in self.layers]
        for layer, threshold in zip(self.layers, soft, strict=True):
            for part in layer.parts:
                register_parametrization(part.module, part.name, threshold)
        optimizer.add_param_group(
            {
                "params": [threshold.s for threshold in soft],
                "weight_decay": weight_decay,
                "name": "soft_thresholds",
            }
        )
        with torch.no_grad():
            self._after_step()

    def _after_step(self) -> None:
        for layer in self.layers:
            layer.set_mask(layer.weight != 0)
