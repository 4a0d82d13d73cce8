"""Offer sparse momentum: prune the smallest weights, and grow where the momentum is largest."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require_flag, require_integer
from .method import Layer, Method, largest, require_density, require_share


class SparseMomentum(Method):
    """Prune the smallest weights of each layer, and grow where the momentum of the loss is largest.

    Dettmers and Zettlemoyer, "Sparse networks from scratch: faster training without losing
    performance", 2019.

    A change: a layer's contribution c is the mean |momentum| of its active weights, divided by the
    sum over layers. Each layer of n active weights prunes ceil(p * n), those with the smallest |w|;
    p falls along a cosine from `rate` to `final_rate`. A layer that contributes more than the
    average, and has less than 20 % of its weights pruned, prunes no larger share than that. Then a
    layer grows floor(c * all that were pruned), at the places with the largest |momentum| that are
    empty, at most 99 % of them; what it has no room for is shared equally among the others. Grown
    weights start at 0; one that was just pruned may grow again at once, and then keeps its value,
    as in the authors' code. The optimizer keeps the momentum of all weights, from dense gradients.
    With Adam, momentum is exp_avg / (sqrt(exp_avg_sq) + 1e-8), also as there.

    A change is made after the first step of a period, so that what is evaluated at the end of an
    epoch has trained; the authors evaluate before they prune.

    Known flaws: rounding down and full layers let the density drift below what was asked for. The
    authors add a correction to what grows, 0.25 * the last one + 0.75 * (start's count - count) +
    the mean of all such differences, which overshoots in turn. `keep_density` repairs that.

    Args:
        model, optimizer, dense, seed: see `Method`. The optimizer must keep momentum:
            `momentum_buffer` or `exp_avg`.
        density: the share of weights to keep, at first the same in each layer; the authors' 0.05.
        every: steps between two changes; the authors': those of an epoch.
        steps: of the whole training, in which p falls.
        rate, final_rate: p at first and at last; the authors' 0.5 (also 0.2) and 0.005.
        keep_density: False: as published. True: as many weights grow as were pruned, exactly; what
            rounding down leaves goes to the layers with the largest remainders; a layer may fill.

    Raises as `Method` does; ValueError if the optimizer keeps no momentum of a masked weight.
    `step` raises RuntimeError if a weight that masks are chosen for has had no gradient yet.
    """

    dense_gradient = True
    saved = (*Method.saved, "correction", "missing", "changes")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        every: int,
        steps: int,
        rate: float = 0.5,
        final_rate: float = 0.005,
        keep_density: bool = False,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_integer("every", every, 1)
        require_integer("steps", steps, 1)
        require_share("rate", rate)
        require_share("final_rate", final_rate)
        require_flag("keep_density", keep_density)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.every, self.steps, self.keep_density = every, steps, keep_density
        self.rate, self.final_rate = rate, final_rate
        self._start(density, "uniform")
        self.start_count = sum(int(layer.mask.sum()) for layer in self.layers)
        self.correction, self.missing, self.changes = 0.0, 0, 0

    def _all_layers(self) -> list[Layer]:
        layers = super()._all_layers()
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for layer in layers:
            group = group_of[id(layer.weight)]
            if not group.get("momentum", "betas" in group):
                raise ValueError(
                    f"optimizer ({type(self.optimizer).__name__}) keeps no momentum of the weight "
                    f"of {layer.names[0] or 'the model'}: give it some, or take Adam"
                )
        return layers

    def _after_step(self) -> None:
        for layer in self.layers:
            layer.weight.mul_(layer.mask)  # decay must not find values that nothing uses
        if self._first_of_period(self.every):
            self._change_masks()

    def _change_masks(self) -> None:
        momenta = [self._momentum(layer) for layer in self.layers]
        active = [int(layer.mask.sum()) for layer in self.layers]
        means = [
            float((momentum * layer.mask).sum()) / max(count, 1)
            for momentum, layer, count in zip(momenta, self.layers, active, strict=True)
        ]
        total, average = sum(means), 1 / len(means)
        shares = [mean / total if 0 < total < math.inf else average for mean in means]
        done = min(self.steps_done / self.steps, 1)
        rate = (self.rate - self.final_rate) * (1 + math.cos(math.pi * done)) / 2 + self.final_rate
        pruned, room = [], []
        for layer, count, share in zip(self.layers, active, shares, strict=True):
            empty = layer.weight.numel() - count
            sparsity = empty / layer.weight.numel()
            growing = sparsity < 0.2 and share > average
            pruned.append(math.ceil((min(sparsity, rate) if growing else rate) * count))
            room.append(empty + pruned[-1])
        grown = self._growth(sum(pruned), shares, room)
        for i, (layer, momentum) in enumerate(zip(self.layers, momenta, strict=True)):
            size = layer.weight.abs().masked_fill(~layer.mask, -torch.inf)
            kept = largest(size, active[i] - pruned[i])
            anew = largest(momentum.masked_fill(kept, -torch.inf), grown[i])
            self._change(layer, kept | anew, keep_state=True)
        missing = self.start_count - (sum(active) - sum(pruned) + sum(grown))
        self.missing, self.changes = self.missing + missing, self.changes + 1
        mean = self.missing / self.changes
        self.correction = 0.25 * self.correction + 0.75 * missing + mean

    def _momentum(self, layer: Layer) -> Tensor:
        """Return the magnitude of the momentum of a layer's weight."""
        state = self.optimizer.state.get(layer.weight, {})
        momentum = state.get("exp_avg", state.get("momentum_buffer"))
        if momentum is None:
            raise RuntimeError(
                f"SparseMomentum needs the momentum of the weight of "
                f"{layer.names[0] or 'the model'}, which had no gradient in any step so far"
            )
        if "exp_avg_sq" in state:
            momentum = momentum / (state["exp_avg_sq"].sqrt() + 1e-8)
        return momentum.abs()

    def _growth(self, pruned: int, shares: list[float], room: list[int]) -> list[int]:
        """Return how many weights each layer grows."""
        total = pruned if self.keep_density else max(pruned + self.correction, 0)
        limits = [float(places) if self.keep_density else 0.99 * places for places in room]
        wanted = [share * total for share in shares]
        while True:
            excess = sum(max(want - limit, 0) for want, limit in zip(wanted, limits, strict=True))
            wanted = [min(pair) for pair in zip(wanted, limits, strict=True)]
            others = [i for i, limit in enumerate(limits) if wanted[i] < limit]
            if not (excess and others):
                break
            for i in others:
                wanted[i] += excess / len(others)
        grown = [int(want) for want in wanted]
        if self.keep_density:
            order = sorted(range(len(grown)), key=lambda i: grown[i] - wanted[i])
            for i in order:
                grown[i] += min(1, pruned - sum(grown), room[i] - grown[i])
        return grown
