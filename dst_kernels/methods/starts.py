"""Choose how many weights each layer begins with, and which: the random masks of sparse starts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..arguments import described

DISTRIBUTIONS = ("uniform", "erdos_renyi", "erdos_renyi_kernel")


def require_distribution(value: object) -> None:
    """Raise ValueError unless `value` is one of DISTRIBUTIONS."""
    if value not in DISTRIBUTIONS:
        accepted = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"distribution must be one of {accepted}, but is {described(value)}")


def layer_counts(shapes: Sequence[Sequence[int]], density: float, distribution: str) -> list[int]:
    """Return how many weights each layer keeps, round(density * all weights) in total.

    Args:
        shapes: of each weight, [out, in] or [out, in, *kernel].
        density: the share of all these weights to keep, in (0, 1].
        distribution: "uniform": the same share of each layer. "erdos_renyi": a share in proportion
            to (in + out) / (in * out) (Mocanu et al., 2018, eq. 3). "erdos_renyi_kernel": to
            (in + out + height + width) / (in * out * height * width) (Evci et al., 2020, sec. 3).
            Layers that would need more than all of their weights are dense; the others make up.
    """
    sizes = [prod(shape) for shape in shapes]
    total = round(density * sum(sizes))
    if distribution == "uniform":
        proportions = [1.0] * len(shapes)
    else:
        counted = None if distribution == "erdos_renyi_kernel" else 2
        proportions = [sum(shape[:counted]) / prod(shape[:counted]) for shape in shapes]
    wanted = [float(size) for size in sizes]  # those that turn out to be dense stay so
    others = list(range(len(sizes)))
    while others:
        left = total - sum(size for i, size in enumerate(sizes) if i not in others)
        scale = left / sum(proportions[i] * sizes[i] for i in others)
        dense = [i for i in others if scale * proportions[i] > 1]
        if not dense:
            for i in others:
                wanted[i] = scale * proportions[i] * sizes[i]
            break
        others = [i for i in others if i not in dense]
    counts = [int(value) for value in wanted]
    # Those with the largest remainders get what rounding down has left.
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def random_mask(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a boolean mask of the weight's shape with `count` random places True."""
    everywhere = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    mask = torch.zeros_like(everywhere)
    mask.view(-1)[random_places(everywhere, count, generator)] = True
    return mask


def random_places(free: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` distinct flat indices, int64, drawn uniformly from where `free` is True.

    `free` has at least `count` places. The host waits for the device.
    """
    places = free.reshape(-1).nonzero().view(-1)
    chosen = torch.randperm(len(places), generator=generator, device=free.device)[:count]
    return places[chosen]
