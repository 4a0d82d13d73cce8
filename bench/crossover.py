"""The planner's table for CPUs: below which share of kept weights kept rows win in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dst_kernels import nn
from dst_kernels.optim import DSTSGD
from dst_kernels.training.latency import take_turns

from .plan import write_table
from .results import CPU, Environment

_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
_WORTH = 0.98  # of the packed step's time
_SECONDS = 0.002  # of one path, before the other has its turn
_LINEAR = (
    (100, 300),
    (300, 784),
    (256, 256),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (4096, 4096),
)
_TOKENS = (1, 4, 16, 64, 256)
# Channels in and out, kernel, stride, height and width. No strided kernel of one element, where
# torch is slow: it would stand for all others of its sizes.
_CONV = (
    (20, 50, 5, 1, 12),
    (32, 32, 3, 1, 16),
    (64, 64, 3, 1, 32),
    (64, 64, 3, 1, 56),
    (128, 128, 3, 1, 16),
    (256, 256, 3, 1, 8),
    (512, 512, 3, 1, 4),
    (64, 128, 3, 2, 32),
    (256, 512, 3, 2, 8),
    (64, 256, 1, 1, 16),
    (128, 256, 1, 1, 16),
    (1024, 256, 1, 1, 8),
    (512, 2048, 1, 1, 4),
)
_IMAGES = (1, 8, 64)
_MOST = 1.2e9  # M N K: larger cases take too long, and differ no more


class _Case(NamedTuple):
    kind: str
    M: int
    N: int
    K: int
    layer: Callable[[], Any]
    input_shape: tuple[int, ...]


def cases() -> Iterator[_Case]:
    """Yield the layers that are measured."""
    for N, K in _LINEAR:
        for M in _TOKENS:
            if M * N * K <= _MOST:
                yield _Case("linear", M, N, K, partial(nn.MaskedLinear, K, N), (M, K))
    for channels, N, kernel, stride, size in _CONV:
        kind = "conv1x1" if kernel == 1 else "conv"
        K, padding = channels * kernel**2, kernel // 2
        layer = partial(nn.MaskedConv2d, channels, N, kernel, stride, padding, bias=False)
        for images in _IMAGES:
            M = images * (size // stride) ** 2
            if M * N * K <= 4 * _MOST:
                yield _Case(kind, M, N, K, layer, (images, channels, size, size))


def write_crossovers(path: Path, environment: Environment, log: Callable[[str], object]) -> dict:
    """Measure the crossover of every case and dtype, write the planner's table and return it."""
    found = []
    for case in cases():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            sizes = {"kind": case.kind, "M": case.M, "N": case.N, "K": case.K, "dtype": name}
            shares = {"share": crossover(case, dtype, False)}
            shares["share_if_made"] = crossover(case, dtype, True)
            found.append({**sizes, **shares})
            log(str(found[-1]))
    head = asdict(environment) | {"gpu": CPU, "measured_on": environment.gpu}
    return write_table(path, head, {"kept": found})


def crossover(case: _Case, dtype: torch.dtype, made: bool) -> float:
    """Return the largest share up to which the sparse path is worth it, by bisection; 0: none.

    `made`: the step of an optimizer makes the rows, and is part of the time.
    """
    low, high = -1, len(_SHARES)
    while high - low > 1:
        middle = (low + high) // 2
        if _is_worth(case, dtype, _SHARES[middle], made):
            low = middle
        else:
            high = middle
    return _SHARES[low] if low >= 0 else 0.0


def _is_worth(case: _Case, dtype: torch.dtype, share: float, made: bool) -> bool:
    """Return whether training is faster on the sparse path than on the packed one."""
    calls = {path: _training(case, dtype, share, path, made) for path in ("packed", "sparse")}
    turns = take_turns(calls, _SECONDS)
    ratios = sorted(s / p for s, p in zip(turns["sparse"], turns["packed"], strict=True))
    return ratios[len(ratios) // 2] <= _WORTH


def _training(
    case: _Case, dtype: torch.dtype, share: float, path: str, made: bool
) -> Callable[[], None]:
    """Return a forward and a backward, and a step that changes nothing if it makes the rows."""
    layer = case.layer().to(dtype)
    layer.path = path
    limit = layer.weight.detach().abs().float().flatten(1).quantile(1 - share, dim=1)
    layer.threshold.data = limit
    input = torch.randn(case.input_shape).to(dtype).requires_grad_()
    grad = torch.randn_like(layer(input))
    optimizer = DSTSGD(layer, lr=0.0, momentum=0.9) if made else None

    def run() -> None:
        layer(input).backward(grad)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run
