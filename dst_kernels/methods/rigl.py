"""Offer RigL: prune the smallest weights, and grow where the dense gradient is largest."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..arguments import require_integer
from .method import Method, largest, require_density, require_share
from .starts import require_distribution


class RigL(Method):
    """Prune, every `every` steps, the smallest weights and grow where the gradient is largest.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.

    At step t, a multiple of `every` below T = until * steps, each layer of n active weights prunes
    k = int(rate / 2 * (1 + cos(pi * t / T)) * n), those with the smallest |w|, and grows k others,
    those with the largest |gradient| among all places that are then empty. Grown weights start
    at 0, without momentum. One that was just pruned may grow again at once: it keeps its value and
    momentum, as in the authors' code. The count of each layer never changes.

    Weights that are masked out have a gradient in these steps alone, and afterwards are 0 again,
    with their momentum. The authors change masks instead of updating weights; here the weights
    take the step of the optimizer as well, and are judged after it.

    Args:
        model, optimizer, dense, seed: see `Method`. With a uniform start, the authors' first layer
            is dense.
        density: the share of the weights of all layers to keep.
        steps: of the whole training.
        every: steps between two changes; the authors' 100.
        rate: the share to prune at first; the authors' 0.3.
        until: the share of `steps` after which masks stay; the authors' 0.75.
        distribution: of the start, "erdos_renyi_kernel", "erdos_renyi" or "uniform".

    Raises as `Method` does; `step` raises RuntimeError if gradients are dropped before it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        steps: int,
        every: int = 100,
        rate: float = 0.3,
        until: float = 0.75,
        distribution: str = "erdos_renyi_kernel",
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_integer("steps", steps, 1)
        require_integer("every", every, 1)
        require_share("rate", rate)
        require_share("until", until)
        require_distribution(distribution)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.every, self.rate, self.last_step = every, rate, until * steps
        self._start(density, distribution)
        self._ask_for_gradients()

    def _changes_at(self, step: int) -> bool:
        return step % self.every == 0 and step < self.last_step

    def _after_step(self) -> None:
        if self._changes_at(self.steps_done):
            rate = self.rate / 2 * (1 + math.cos(math.pi * self.steps_done / self.last_step))
            gradients = [self._gradient(layer) for layer in self.layers]
            for layer, gradient in zip(self.layers, gradients, strict=True):
                count = int(layer.mask.sum())
                pruned = int(rate * count)
                size = layer.weight.abs().masked_fill(~layer.mask, -torch.inf)
                kept = largest(size, count - pruned)
                grown = largest(gradient.abs().masked_fill(kept, -torch.inf), pruned)
                self._change(layer, kept | grown)
                for tensor in (layer.weight, *self._state(layer)):
                    tensor.masked_fill_(~layer.mask, 0)
        self._ask_for_gradients()

    def _ask_for_gradients(self) -> None:
        """Let the next backward pass make dense gradients if masks change after it."""
        dense = self._changes_at(self.steps_done + 1)
        for layer in self.layers:
            for part in layer.parts:
                if part.module._fixed[part.name].dense_gradient is not dense:
                    part.set_fixed_mask(layer.mask, dense)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._ask_for_gradients()
