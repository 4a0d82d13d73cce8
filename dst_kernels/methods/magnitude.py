"""Offer magnitude pruning: at once or along a cubic ramp, of all layers together or of each."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.optim import Optimizer

from ..arguments import described, require_integer
from .method import Method, largest, require_density, require_share

SCOPES = ("global", "layer")


class MagnitudePruning(Method):
    """Train all weights, prune the smallest ones by and by, and then train those that are left.

    The ramp is that of Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning
    for model compression", 2017.

    Let p grow from 0 at step begin * steps to 1 at step until * steps (both rounded). Every `every`
    steps between them, counted from the first, and at the last one, the smallest |w| are pruned so
    that round(n * (density + (1 - density) * (1 - p)^3)) of n weights are kept, exactly. Pruned
    weights stay pruned, at 0. With `begin` equal to `until` all are pruned at once, after that
    step; with both 0 when this is built, so that what follows is fine-tuning.

    Args:
        model, optimizer, dense, seed: see `Method`; nothing here is random.
        density: the share of weights to keep in the end.
        steps: of the whole training.
        begin, until: where the ramp begins and ends, as shares of `steps`. These are choices of
            this library: the publication gives none for all tasks.
        every: steps between two changes; the publication names 100 to 1,000.
        scope: "global": the n weights are those of all layers together, so that a layer may lose
            more than others, even all of its weights. "layer": those of each layer.

    Raises as `Method` does.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        steps: int,
        begin: float = 0.25,
        until: float = 0.75,
        every: int = 100,
        scope: str = "global",
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_integer("steps", steps, 1)
        require_share("begin", begin)
        require_share("until", until)
        if until < begin:
            raise ValueError(f"until must be at least begin, {begin}, but is {until}")
        require_integer("every", every, 1)
        if scope not in SCOPES:
            accepted = " or ".join(map(repr, SCOPES))
            raise ValueError(f"scope must be {accepted}, but is {described(scope)}")
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.density, self.every, self.scope = density, every, scope
        self.first_step, self.last_step = round(begin * steps), round(until * steps)
        if self.last_step == 0:
            with torch.no_grad():
                self._prune(density)

    def _after_step(self) -> None:
        done = self.steps_done - self.first_step
        if done < 0 or self.steps_done > self.last_step:
            return
        if self.steps_done == self.last_step:
            self._prune(self.density)
        elif done % self.every == 0:
            left = 1 - done / (self.last_step - self.first_step)
            self._prune(self.density + (1 - self.density) * left**3)

    def _prune(self, share: float) -> None:
        """Keep this share of the weights, the largest of those that are kept now."""
        sizes = [
            layer.weight.abs().masked_fill(~layer.mask, -torch.inf).reshape(-1)
            for layer in self.layers
        ]
        if self.scope == "global":
            device = sizes[0].device
            everything = torch.cat([size.to(device) for size in sizes])
            kept = largest(everything, round(share * len(everything)))
            masks = [*kept.split([len(size) for size in sizes])]
        else:
            masks = [largest(size, round(share * len(size))) for size in sizes]
        for layer, mask in zip(self.layers, masks, strict=True):
            self._change(layer, mask.to(layer.weight.device).view(layer.weight.shape))
