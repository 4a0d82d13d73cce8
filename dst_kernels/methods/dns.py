"""Offer dynamic network surgery: prune below fixed thresholds, and splice what grows back."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require, require_integer, require_number
from ..reference.wide import wide_dtype
from .method import Method, require_density, require_share


class DynamicNetworkSurgery(Method):
    """Prune weights below a threshold of their layer; they train on, and come back when above it.

    DNS: Guo, Yao and Chen, "Dynamic network surgery for efficient DNNs", NeurIPS 2016.

    At step begin * steps each layer gets its threshold tau = max(mu + c * sigma, 0), once, from the
    mean mu and the standard deviation sigma of its |w|; before, all weights are kept. Then, and in
    each later step before until * steps, masks change with the probability (1 + gamma * k)^-power,
    where k counts steps from the first change: |w| <= 0.9 * tau is pruned, |w| > 1.1 * tau is
    kept, and what lies between stays as it is. Weights that are pruned keep their values, and train
    with the gradient of the masked network, so that they can come back ("splicing").

    The publication begins with a trained network, and masks biases, too; here biases are dense.
    Weight decay also acts on pruned weights.

    Args:
        model, optimizer, dense, seed: see `Method`. If changes begin at 0, they do when this is
            built, from the weights that the model has then.
        density: the share of all weights with |w| above tau, from which one c for all layers
            follows. What is kept comes out near it, not exactly: at first the weights between
            0.9 and 1.1 tau are kept, too, and later weights cross in both directions.
        steps: of the whole training.
        begin: the share of `steps` after which masks change: 0 for a model that is trained, as in
            the publication.
        until: the share of `steps` after which masks stay. The authors stop after 8,000 to 14,000
            steps.
        c: give it or `density`. The authors' 3 or 4 for LeNet-5.
        gamma, power: the authors' 1e-3 (1e-4 in one layer) and 1.

    Raises as `Method` does; ValueError unless exactly one of `density` and `c` is given.
    """

    dense_gradient = True
    saved = (*Method.saved, "thresholds")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float | None = None,
        *,
        steps: int,
        begin: float = 0.25,
        until: float = 0.75,
        c: float | None = None,
        gamma: float = 1e-3,
        power: float = 1.0,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        if (density is None) == (c is None):
            given = "none is" if c is None else "both are"
            raise ValueError(f"exactly one of density and c must be given, but {given}")
        if density is not None:
            require_density("density", density)
        if c is not None:
            finite = isinstance(c, Real) and not isinstance(c, bool) and math.isfinite(c)
            require(finite, "c", "a finite number", c)
        require_integer("steps", steps, 1)
        require_share("begin", begin)
        require_share("until", until)
        if until < begin:
            raise ValueError(f"until must be at least begin, {begin}, but is {until}")
        require_number("gamma", gamma)
        require_number("power", power)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.density, self.gamma, self.power = density, gamma, power
        self.c = 0.0 if c is None else c
        self.first_step, self.last_step = round(begin * steps), until * steps
        self.thresholds: list[float] = []  # of each layer, once they are known
        if self.first_step == 0:
            with torch.no_grad():
                self._after_step()

    def _after_step(self) -> None:
        done = self.steps_done - self.first_step
        if done < 0 or (done and self.steps_done >= self.last_step):
            return
        if done == 0:
            self.thresholds = self._find_thresholds()
        drawn = torch.rand((), generator=self._generator(), dtype=torch.float64).item()
        if drawn >= (1 + self.gamma * done) ** -self.power:
            return
        for layer, threshold in zip(self.layers, self.thresholds, strict=True):
            size = layer.weight.abs()
            stays = layer.mask & ~(size <= 0.9 * threshold)
            layer.set_mask(stays | ~(size <= 1.1 * threshold))  # a NaN is kept

    def _find_thresholds(self) -> list[float]:
        sizes = [layer.weight.abs().to(wide_dtype(layer.weight.device)) for layer in self.layers]
        means = [size.mean().item() for size in sizes]
        spreads = [size.std(correction=0).item() for size in sizes]
        c = self.c
        if self.density is not None:
            scores = torch.cat(
                [
                    (size.reshape(-1).to(sizes[0].device) - mean) / (spread or 1)
                    for size, mean, spread in zip(sizes, means, spreads, strict=True)
                ]
            )
            c = _boundary(scores, round(self.density * len(scores)))
        return [max(mean + c * spread, 0.0) for mean, spread in zip(means, spreads, strict=True)]


def _boundary(scores: Tensor, count: int) -> float:
    """Return a number that `count` of the scores exceed."""
    if count == len(scores):
        return scores.min().item() - 1
    return scores.topk(count + 1).values[-2:].mean().item()
