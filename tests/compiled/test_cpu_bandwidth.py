"""How much of the machine's copy bandwidth the CPU library's passes over 16 M weights reach.

Bandwidth is bytes read and written by time: `y.copy_(x)` of 16 M float32 numbers moves 8 bytes for
each; pack reads W and writes W * M (8 bytes, 6 in bfloat16), post reads G and W and writes dW (12),
a step with momentum reads G, W and the buffer and writes W, the buffer and W * M (24). Thresholds
are a 4,096th of that and not counted. All use the threads that torch has, and take turns with the
copy, so that a busy machine slows them alike: the median of the rounds' ratios counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from dst_kernels.backends.compiled.library import BUILT, unavailable

pytestmark = [
    pytest.mark.timing,
    pytest.mark.skipif(not BUILT["cpu"], reason="the CPU library was not built"),
]

ROWS = COLUMNS = 4096
LIMIT = 0.7
ABSENT = torch.empty(0)


def _passes() -> dict[str, tuple[int, Callable[[], None]]]:
    """Bytes for each weight, and the call; "copy" is what the others are compared with."""
    assert unavailable("cpu") is None, unavailable("cpu")
    ops = torch.ops.dst_kernels_compiled
    weight, grad, output = (torch.randn(ROWS, COLUMNS) for _ in range(3))
    short, buffer = output.bfloat16(), torch.zeros(ROWS, COLUMNS)
    threshold, effective, of_threshold = torch.rand(ROWS), torch.empty(ROWS), torch.zeros(ROWS)
    kept = torch.empty(1, dtype=torch.int64)
    hypers = torch.tensor([[1e-3, 0, 0, 0, 0, 0.9, 0, 0]], dtype=torch.float64)

    def pack(masked):
        return lambda: ops.pack([weight], [threshold], [-1, 0], [masked], [effective], kept)

    def post():
        ops.post([grad], [weight], [threshold], [0, 1], [output], [of_threshold])

    def step():
        ops.sgd_step(
            [weight], [grad], [buffer], [threshold], [ABSENT], [of_threshold], [output], kept,
            [0, 0, 0, 1, -1, 0, 0], hypers, [ABSENT], [ABSENT], [ABSENT] * 3,
        )  # fmt: skip

    return {
        "copy": (8, lambda: output.copy_(weight)),
        "pack": (8, pack(output)),
        "pack to bfloat16": (6, pack(short)),
        "post": (12, post),
        "step": (24, step),
    }


def _bandwidths(passes: dict[str, tuple[int, Callable]], rounds: int) -> dict[str, list[float]]:
    """Bytes per second, round by round."""
    found = {name: [] for name in passes}
    for _ in range(rounds):
        for name, (size, call) in passes.items():
            start = time.perf_counter()
            call()
            found[name].append(size * ROWS * COLUMNS / (time.perf_counter() - start))
    return found


def _ratios_to_copy(found: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: statistics.median(mine / copy for mine, copy in zip(each, found["copy"], strict=True))
        for name, each in found.items()
    }


def test_passes_reach_most_of_the_copy_bandwidth():
    passes = _passes()
    _bandwidths(passes, rounds=3)  # warm up
    attempts = []
    for _ in range(3):
        found = _bandwidths(passes, rounds=15)
        ratios = _ratios_to_copy(found)
        del ratios["copy"]
        attempts.append(ratios)
        print(f"\ncopy {statistics.median(found['copy']) / 1e9:.1f} GB/s, of which:", end=" ")
        print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    best = {name: max(attempt[name] for attempt in attempts) for name in attempts[0]}
    assert min(best.values()) >= LIMIT, best
