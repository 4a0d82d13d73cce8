"""Offer DEEP-R: a random walk of weights with fixed signs, some active and the others dormant."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require_flag, require_number
from .method import Layer, Method, require_density
from .starts import random_places

AWAKENED = 1e-12  # the magnitude of a weight that has just become active


class DeepR(Method):
    """Let weights that would change their sign go dormant, and wake as many at random places.

    Bellec et al., "Deep rewiring: training very sparse deep networks", ICLR 2018.

    Each weight has a sign s that is random and never changes, and w = s * theta. Active ones have
    theta > 0. They start at |N(0, 1)| / sqrt(inputs of the row), on a share `density` of each
    layer's places. After each step of the optimizer an active theta also changes by
    -lr * l1 + lr * noise * N(0, 1), with the learning rate of the optimizer's group. Where theta is
    then at most 0, the weight goes dormant: 0, without momentum. As many random dormant ones
    become active, with theta = 1e-12, so that the number of active weights never changes.

    Soft DEEP-R (`soft=True`) wakes none: dormant theta, at most 0, take part in the random walk,
    by the noise alone, and come back when they are above 0. They are clipped at
    -(1 - density) / density * T / l1, T = lr * noise^2 / 2, so that without gradients a share
    `density` would be active in the long run; the number of active weights is not exact. They start
    between that limit and 0, uniformly, and weight decay, if the optimizer has some, shrinks them.

    Known flaw: masks change in every step, and the host waits for the device each time. Small
    networks train clearly slower than with fixed masks; soft DEEP-R draws noise for all weights.

    Args:
        model, optimizer, dense, seed: see `Method`. The model's weights get new values. The authors
            use plain gradient descent, lr 0.5 * 0.8^epoch; momentum works, too.
        density: the share of weights that are active.
        l1, noise: both 1e-5 in the authors' code.
        soft: see above; it needs `l1` and `noise` above 0.
        per_layer: whether each layer keeps its number of active weights; else all layers
            together do, and any dormant one of the model is as likely to become active.

    Raises as `Method` does.
    """

    saved = (*Method.saved, "seed")  # signs follow from the seed

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float,
        *,
        l1: float = 1e-5,
        noise: float = 1e-5,
        soft: bool = False,
        per_layer: bool = True,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require_density("density", density)
        require_flag("soft", soft)
        require_flag("per_layer", per_layer)
        require_number("l1", l1, positive=soft)
        require_number("noise", noise, positive=soft)
        super().__init__(model, optimizer, dense=dense, seed=seed)
        self.density, self.l1, self.noise = density, l1, noise
        self.soft, self.per_layer = soft, per_layer
        self._start(density, "uniform")
        self.signs = self._draw_signs()
        with torch.no_grad():
            for layer, signs, rate in zip(self.layers, self.signs, self._rates(), strict=True):
                numbers = self._generator(layer)
                drawn = torch.empty_like(layer.weight).normal_(generator=numbers).abs_()
                theta = drawn / prod(layer.shape[1:]) ** 0.5
                if soft:
                    asleep = torch.empty_like(theta).uniform_(generator=numbers)
                    theta = torch.where(layer.mask, theta, asleep * self._lowest(rate))
                    layer.weight.copy_(theta * signs)
                else:
                    layer.weight.copy_(theta * signs * layer.mask)

    def _draw_signs(self) -> list[Tensor]:
        """Return the sign of each weight, int8, the same on every device."""
        numbers = torch.Generator().manual_seed(self.seed)
        signs = []
        for layer in self.layers:
            bits = torch.randint(0, 2, layer.weight.shape, generator=numbers, dtype=torch.int8)
            signs.append((2 * bits - 1).to(layer.weight.device))
        return signs

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.signs = self._draw_signs()

    def _rates(self) -> list[float | Tensor]:
        """Return the current learning rate of each layer."""
        rates = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        return [rates[id(layer.weight)] for layer in self.layers]

    def _lowest(self, rate: float | Tensor) -> float | Tensor:
        """Return where dormant theta of soft DEEP-R are clipped."""
        return -(1 - self.density) / self.density * (rate * self.noise**2 / 2) / self.l1

    def _after_step(self) -> None:
        layers = [*zip(self.layers, self.signs, self._rates(), strict=True)]
        if self.soft:
            for each in layers:
                self._walk_softly(*each)
            return
        counts = [self._walk(*each) for each in layers]
        free = [
            layer.mask.numel() - active
            for layer, (active, _) in zip(self.layers, counts, strict=True)
        ]
        gone = [count for _, count in counts]
        if any(gone) and not self.per_layer:
            gone = _shared_out(free, sum(gone), self._generator())
        for layer, signs, places, count in zip(self.layers, self.signs, free, gone, strict=True):
            if count:
                self._wake(layer, signs, places, count)

    def _walk(self, layer: Layer, signs: Tensor, rate: float | Tensor) -> tuple[int, int]:
        """Move the active weights; those that cross 0 go dormant. Return (active, gone dormant)."""
        places = layer.mask.reshape(-1).nonzero().view(-1)
        sign = signs.take(places)
        theta = layer.weight.take(places) * sign
        noise = torch.empty_like(theta).normal_(generator=self._generator(layer))
        theta += noise * (rate * self.noise) - rate * self.l1
        crossed = theta <= 0
        _put(layer.weight, places, (theta * sign).masked_fill_(crossed, 0))
        gone = places[crossed]
        if len(gone):
            mask = layer.mask.clone()
            for tensor in (mask, *self._state(layer)):
                _put(tensor, gone, 0)
            layer.set_mask(mask)
        return len(places) - len(gone), len(gone)

    def _walk_softly(self, layer: Layer, signs: Tensor, rate: float | Tensor) -> None:
        """Move all weights; those that cross 0 go dormant or come back."""
        theta = layer.weight * signs
        noise = torch.empty_like(theta).normal_(generator=self._generator(layer))
        theta += noise * (rate * self.noise) - layer.mask * (rate * self.l1)
        crossed = theta <= 0
        lowest = self._lowest(rate)
        theta = torch.where(crossed & (theta < lowest), lowest, theta)
        layer.weight.copy_(theta * signs)
        for tensor in self._state(layer):
            tensor.masked_fill_(crossed, 0)
        layer.set_mask(~crossed)

    def _wake(self, layer: Layer, signs: Tensor, free: int, count: int) -> None:
        """Make `count` random ones of the `free` dormant weights active."""
        mask = layer.mask.clone()
        numbers = self._generator(layer)
        numbers.manual_seed(numbers.initial_seed() ^ 1)  # others than those of the noise
        places = draw_places(mask.reshape(-1), free, count, numbers)
        _put(mask, places, True)
        _put(layer.weight, places, signs.take(places) * AWAKENED)
        layer.set_mask(mask)


def _shared_out(free: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Return how many of `count` places each layer gets if all free ones are equally likely."""
    nobody = torch.zeros(sum(free), dtype=torch.bool)
    chosen = draw_places(nobody, sum(free), count, generator)
    layers = torch.bucketize(chosen, torch.tensor(free).cumsum(0), right=True)
    return torch.bincount(layers, minlength=len(free)).tolist()


def draw_places(taken: Tensor, free: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` distinct places, int64, drawn uniformly from where `taken` is False.

    `free` is the number of those places. If they are many, the time depends on `count` alone.
    """
    if 4 * free < len(taken) or 2 * count > free:
        return random_places(~taken, count, generator)
    taken = taken.clone()
    found: list[Tensor] = []
    missing = count
    while missing:
        drawn = torch.randint(
            len(taken), (missing + missing // 4 + 8,), generator=generator, device=taken.device
        )
        fresh = drawn[~taken[drawn]].unique()  # sorted: which of them stay is drawn, too
        order = torch.randperm(len(fresh), generator=generator, device=taken.device)
        fresh = fresh[order[:missing]]
        taken[fresh] = True
        found.append(fresh)
        missing -= len(fresh)
    return torch.cat(found)


def _put(tensor: Tensor, places: Tensor, values: Any) -> None:
    """Write to flat places; unlike `Tensor.put_` this works where algorithms must repeat."""
    if isinstance(values, Tensor):
        values = values.to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1)[places] = values
    else:
        tensor[torch.unravel_index(places, tensor.shape)] = values
