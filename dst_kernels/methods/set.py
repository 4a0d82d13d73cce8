"""Offer SET: prune the weights nearest zero after each epoch, and grow as many at random places."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require_flag, require_integer
from .method import Layer, Method, largest, require_density, require_share
from .starts import require_distribution


class SET(Method):
    """Prune, every `every` steps, the weights nearest zero in each layer and grow as many anew.

    Sparse Evolutionary Training: Mocanu et al., "Scalable training of artificial neural networks
    with adaptive sparse connectivity inspired by network science", Nature Communications 2018.

    In each layer int(rate * n) of its n positive weights are pruned, those nearest zero, and as
    large a share of its negative ones; so are weights that are exactly 0, those that were grown and
    never moved. As many grow at random empty places, also at those just pruned, with the value 0.
    A layer that has all its weights does not change. The count of each layer never changes.

    A change is made after the first step of the next period, not after the last one of the old: so
    what is evaluated or kept at the end of an epoch has trained, as in the authors' code, which
    evaluates before it prunes.

    Args:
        model, optimizer, dense, seed: see `Method`. The authors' output layer is dense.
        density: the share of the weights of all layers to keep. The authors choose the constant 20
            in a layer's density, 20 (n_in + n_out) / (n_in n_out).
        every: steps between two changes; the authors': those of an epoch.
        rate: the share to prune; the authors' 0.3.
        separate_signs: False: as in the comparison by Mostafa and Wang (ICML 2019): the
            int(rate * n) + 1 smallest |w| of a layer's n weights are pruned, whatever their sign,
            at most as many as places are empty, and none of them grows again at once. Their rates
            at densities of 0.1, 0.2, 0.3, 0.4 and 0.5 are 0.138, 0.07, 0.046, 0.034 and 0.028.
        distribution: of the start, "erdos_renyi" (the authors'), "erdos_renyi_kernel" or "uniform".

    Raises as `Method` does.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        every: int,
        rate: float = 0.3,
        separate_signs: bool = True,
        distribution: str = "erdos_renyi",
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_integer("every", every, 1)
        require_share("rate", rate)
        require_flag("separate_signs", separate_signs)
        require_distribution(distribution)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.every, self.rate, self.separate_signs = every, rate, separate_signs
        self._start(density, distribution)

    def _after_step(self) -> None:
        if self._first_of_period(self.every):
            for layer in self.layers:
                self._evolve(layer)

    def _evolve(self, layer: Layer) -> None:
        active = layer.mask
        count = int(active.sum())
        if count == active.numel():
            return
        if self.separate_signs:
            weight = layer.weight
            kept = self._far_from_zero(weight, active) | self._far_from_zero(-weight, active)
            free = ~kept
        else:
            free = ~active
            pruned = min(int(self.rate * count) + 1, count, active.numel() - count)
            scores = layer.weight.abs().masked_fill(free, -torch.inf)
            kept = largest(scores, count - pruned)
        self._regrow(layer, kept, free, count - int(kept.sum()))

    def _far_from_zero(self, weight: Tensor, active: Tensor) -> Tensor:
        """Return which of the positive weights stay: all but the share nearest zero. So do NaN."""
        positive = active & ~(weight <= 0)
        count = int(positive.sum())
        scores = weight.masked_fill(~positive, -torch.inf)
        return largest(scores, count - int(self.rate * count))
