"""What is to be reached by single layers on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import MASKED_WEIGHT, Case
from .ceilings import COPY
from .goal import Goal
from .measurements import COMPILED_DST, Measurements
from .suites import SUITES
from .work import bytes_of

__all__ = ["LAYER_GOALS"]


def _time(pass_name: str, ours: str, others: str | Sequence[str]):
    return lambda found, case: found.time_ratio(case.name, pass_name, ours, others)


def _speed(pass_name: str, ours: str, other: str):
    """How much of the other's speed is reached."""
    return lambda found, case: found.time_ratio(case.name, pass_name, other, ours)


def _ratio(pass_name: str, metric: str, ours: str, other: str):
    return lambda found, case: found.ratio(case.name, pass_name, metric, ours, other)


def _bandwidth(pass_name: str):
    return lambda found, case: found.share_of_ceiling(
        case.name, "auto", pass_name, "bandwidth", COPY
    )


def _saved_over_allowed(found: Measurements, case: Case) -> float | None:
    """Beside input, weight and threshold: one masked copy and the effective threshold."""
    saved = found.newest(case.name, "auto", "forward", "saved")
    allowed = case.N * case.K * bytes_of(case.mode.compute) + case.N * 4
    return None if saved is None else saved / allowed


# -- the goals ---------------------------------------------------------------------------------

_ALL = tuple(case for case in SUITES["linear"].cases if case.dtype == "bf16-autocast")
_UP_TO_8K = tuple(case for case in _ALL if case.M <= 8192)
_AT_8K = tuple(case for case in _ALL if case.M == 8192)
_UP_TO_1K = tuple(case for case in _ALL if case.M <= 1024)  # where the host may be what decides
_TF32 = tuple(case for case in SUITES["linear"].cases if case.dtype == "tf32")
_BF16 = tuple(case for case in SUITES["linear"].cases if case.dtype == "bf16")
_FROM_16M = tuple(
    case
    for case in SUITES["streaming"].cases
    if case.op == MASKED_WEIGHT and case.N * case.K >= 2**24
)

_BOTH = "forward_backward"
_TO_DENSE = _time(_BOTH, "auto", "dense")
_TO_COMPILED = _time(_BOTH, "auto", COMPILED_DST)
_TO_EAGER = _time(_BOTH, "auto", "dst_eager")

LAYER_GOALS = (
    Goal("forward+backward ÷ dense, mean", 1.00, _ALL, _TO_DENSE, mean=True),
    Goal("forward+backward ÷ dense, worst", 1.08, _ALL, _TO_DENSE),
    Goal("forward+backward ÷ best compiled DST, mean", 0.93, _ALL, _TO_COMPILED, mean=True),
    Goal("forward+backward ÷ best compiled DST, worst", 1.02, _ALL, _TO_COMPILED),
    Goal("forward+backward ÷ eager DST up to 8k tokens, worst", 0.50, _UP_TO_8K, _TO_EAGER),
    Goal("pack from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, _bandwidth("forward"), True),
    Goal(
        "post from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, _bandwidth("backward"), True
    ),
    Goal(
        "fused dW at 8k tokens, of cuBLAS",
        0.90,
        _AT_8K,
        _speed("grad_weight", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused forward in tf32, of cuBLAS",
        0.85,
        _TF32,
        _speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused forward with bf16 parameters, of cuBLAS",
        0.85,
        _BF16,
        _speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "peak memory of forward+backward ÷ dense, worst",
        1.00,
        _ALL,
        _ratio(_BOTH, "memory", "auto", "dense"),
    ),
    Goal("saved for backward ÷ one masked copy, worst", 1.00, _ALL, _saved_over_allowed),
    Goal(
        "host cost of forward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        _ratio("forward", "host_time", "auto", "dense"),
    ),
    Goal(
        "host cost of forward+backward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        _ratio(_BOTH, "host_time", "auto", "dense"),
    ),
)
