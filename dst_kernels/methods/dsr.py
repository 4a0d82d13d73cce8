"""Offer dynamic sparse reparameterization: prune below a threshold, grow where more have stayed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.optim import Optimizer

from ..arguments import require_integer, require_number
from .method import Method, largest, require_density, require_share


class DynamicSparseReparameterization(Method):
    """Prune weights below one threshold for all layers, and grow as many where more have stayed.

    DSR: Mostafa and Wang, "Parameter efficient training of deep convolutional neural networks by
    dynamic sparse reparameterization", ICML 2019.

    Every `every` steps the active weights with |w| < H are pruned, but each layer keeps its largest
    one. If more than 1.1 * `exchange` are pruned, H halves for the next time; if fewer than 0.9 *
    `exchange`, H doubles. As many weights grow, with the value 0: each layer gets a share in
    proportion to how many of its weights have stayed, at random empty places other than those just
    pruned. What rounding down leaves goes to a random layer; what a layer has no room for goes to
    others. The count of all layers together never changes. If more weights are below H than places
    are empty, nothing is pruned at that time, and H halves.

    Args:
        model, optimizer, dense, seed: see `Method`. The authors keep fully connected layers of
            convolutional networks dense, and the first and the downsampling convolutions of
            ResNet-50.
        density: the share of weights to keep, at first the same in each layer.
        every: steps between two changes. The authors' run on WRN-28-2 begins with 100, and doubles
            it with each drop of the learning rate.
        steps: of the whole training.
        until: the share of `steps` after which masks stay; the authors stop 5 % before the end.
        exchange: how many weights to prune each time, the authors' N_p: 600 for MNIST, 20,000 for
            WRN-28-2, 400,000 for ResNet-50: a small part of the active weights, or H grows on.
        threshold: H at first; the authors' 1e-3.

    Raises as `Method` does.
    """

    saved = (*Method.saved, "threshold")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        every: int = 100,
        steps: int,
        until: float = 0.9,
        exchange: int = 600,
        threshold: float = 1e-3,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_integer("every", every, 1)
        require_integer("steps", steps, 1)
        require_share("until", until)
        require_integer("exchange", exchange, 1)
        require_number("threshold", threshold, positive=True)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.every, self.last_step = every, until * steps
        self.exchange, self.threshold = exchange, threshold
        self._start(density, "uniform")

    def _after_step(self) -> None:
        if self.steps_done % self.every or self.steps_done > self.last_step:
            return
        kept = []
        for layer in self.layers:
            size = layer.weight.abs()
            largest_one = largest(size.masked_fill(~layer.mask, -torch.inf), 1)
            kept.append(layer.mask & (~(size < self.threshold) | largest_one))
        stay = [int(mask.sum()) for mask in kept]
        active = [int(layer.mask.sum()) for layer in self.layers]
        room = [mask.numel() - count for mask, count in zip(kept, active, strict=True)]
        pruned = sum(active) - sum(stay)
        if pruned > 1.1 * self.exchange or pruned > sum(room):
            self.threshold /= 2
        elif pruned < 0.9 * self.exchange:
            self.threshold *= 2
        if 0 < pruned <= sum(room):
            grown = self._growth(pruned, stay, room)
            for layer, mask, count in zip(self.layers, kept, grown, strict=True):
                self._regrow(layer, mask, ~layer.mask, count)

    def _growth(self, total: int, stay: list[int], room: list[int]) -> list[int]:
        """Return how many weights each layer grows."""
        grown = [
            min(total * count // sum(stay), places)
            for count, places in zip(stay, room, strict=True)
        ]
        for i in torch.randperm(len(grown), generator=self._generator()).tolist():
            grown[i] += min(total - sum(grown), room[i] - grown[i])
        return grown
