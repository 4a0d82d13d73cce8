"""Compiles the kernels of a sweep before it, in many processes; the sweep loads what they leave in
Triton's cache on disk.

Triton compiles one kernel at a time, in a second or two, while timing one takes a tenth. So the
processes make the very calls that will be timed, on meta tensors, which have sizes and no memory,
and compile in place of launching.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cases import LayerCase
from .problem import Problem
from .tune_products import PRODUCTS, Call, calls, in_tile, launches_of, split_of

__all__ = ["Compilation", "compilations", "compile_kernels"]

_META = torch.device("meta")


@dataclass(frozen=True)
class Compilation:
    """The kernels of a product in one tile; `chosen`: the one that the library takes."""

    case: LayerCase
    product: str
    tile: Any
    chosen: bool


def compilations(cases: Iterable[LayerCase]) -> list[Compilation]:
    """Of every product of every case in every tile: what a Hopper GPU runs.

    Tiles that differ in their split share most of their kernels. They are far apart, so that the
    later ones find what the first has compiled, and no two processes work on the same.
    """
    found = []
    with _launching_by(lambda self, *args, grid, warmup, **options: None):
        for case in cases:
            for product in PRODUCTS[case.op]:
                launches = _on_meta(case, product, launches_of)
                for tile in sorted(launches.tiles, key=split_of):
                    found.append(Compilation(case, product, tile, tile == launches.chosen))
    return found


def compile_kernels(task: Compilation) -> None:
    """Leave the kernels in Triton's cache, with what launches them."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        _ = kernel.run  # makes Triton build what launches the binary, and load both

    with _launching_by(compile_only):
        _on_meta(task.case, task.product, lambda call: in_tile(call, task.tile))


def _on_meta(case: LayerCase, product: str, use: Callable[[Call], Any]) -> Any:
    with case.mode.precision():
        return use(calls(Problem(case, _META))[product])


@contextlib.contextmanager
def _launching_by(run: Callable) -> Iterator[None]:
    """Kernels are given to `run`, which takes what Triton's own way to run them takes."""
    from triton.runtime.jit import JITFunction

    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before
