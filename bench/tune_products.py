"""What is tuned: the fused products of a case, and the tiles that each can run in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .cases import CONV, LINEAR, MASKED_WEIGHT
from .problem import Problem

__all__ = ["PRODUCTS", "Call", "Launches", "calls", "in_tile", "launches_of", "split_of"]

Call = Callable[[], tuple[Tensor, ...]]
"""Makes a product's results anew."""

_OF_LAYERS = ("forward", "grad_input", "grad_weight")
PRODUCTS = {LINEAR: _OF_LAYERS, CONV: _OF_LAYERS, MASKED_WEIGHT: ("pack", "post")}
"""By the op of a case."""

_GUARD = 0.01
_GRADIENT = "long_tailed", True


def calls(problem: Problem) -> dict[str, Call]:
    """The products of a case by name, each as Triton's kernels make it."""
    from dst_kernels.backends import triton as ours

    weight, threshold, grad = problem.weight, problem.threshold, problem.grad_output
    case = problem.case
    if case.op == MASKED_WEIGHT:
        dtype = problem.mode.compute
        made = (
            lambda: ours.masked_weight(weight, threshold, _GUARD, dtype),
            lambda: ours.masked_weight_backward(grad, weight, threshold, *_GRADIENT),
        )
    else:
        (x,) = problem.inputs
        kind = f"masked_{case.op}"
        forward, grad_input, grad_weight = (
            getattr(ours, name) for name in (kind, f"{kind}_grad_input", f"{kind}_grad_weight")
        )
        geometry, shape = (), ()
        if case.op == CONV:
            pairs = ((number, number) for number in (case.stride, case.padding, 1))
            geometry, shape = (*pairs, case.groups), (x.shape,)
        made = (
            lambda: forward(x, weight, threshold, problem.bias, _GUARD, *geometry),
            lambda: (grad_input(grad, *shape, weight, threshold, *geometry),),
            lambda: grad_weight(grad, x, weight, threshold, *geometry, *_GRADIENT),
        )
    return dict(zip(PRODUCTS[case.op], made, strict=True))


class Launches:
    """What the launchers of one call would run, and in which tiles they could.

    Attributes:
        chosen: the tile that the library takes; None where none was asked for.
        tiles: that and all others, chosen or not, in which the call can run.
        error: what the call raised in the chosen tile; results: what it returned, else None.

    Calling it with a tile launches the kernels and makes no results. There are several launches in
    the gradient of a strided convolution's input, which all choose alike.
    """

    def __init__(self) -> None:
        self.chosen: Any = None
        self.tiles: list[Any] = []
        self.results: tuple[Tensor, ...] | None = None
        self.error: Exception | None = None
        self._runs: list[Callable[[Any], object]] = []

    def __call__(self, tile: Any) -> None:
        for run in self._runs:
            run(tile)

    def note(self, default: Any, candidates: Sequence[Any], run: Callable[[Any], object]) -> Any:
        """For `choosing`."""
        self.chosen = self.chosen or default
        self.tiles = list(dict.fromkeys((*self.tiles, default, *candidates)))
        self._runs.append(run)
        return default


def launches_of(call: Call) -> Launches:
    """Run a call as the library does."""
    found = Launches()
    try:
        with _choosing(found.note):
            found.results = call()
    except Exception as error:
        found.error = error
    return found


def in_tile(call: Call, tile: Any) -> tuple[Tensor, ...]:
    """The results of a call in that tile."""
    with _choosing(lambda default, candidates, run: tile):
        return call()


def _choosing(choose: Callable) -> contextlib.AbstractContextManager:
    from dst_kernels.backends.triton.tuning import choosing

    return choosing(choose)


def split_of(tile: Any) -> int:
    """How many programs share a sum; passes over a weight have none to share."""
    return getattr(tile, "split", 1)
