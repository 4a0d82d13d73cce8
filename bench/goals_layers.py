"""What is to be reached by single layers on a GPU."""

from __future__ import annotations

from .cases import MASKED_WEIGHT, Case
from .figures import bandwidth, ratio, speed, time_ratio
from .goal import Goal
from .measurements import COMPILED_DST, Measurements
from .suites import SUITES
from .work import bytes_of

__all__ = ["LAYER_GOALS"]


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
# The 1x1 ones, and those of few positions in an image.
_SMALL_CONVS = tuple(
    case for case in SUITES["conv"].cases if case.kernel == 1 or case.output_side <= 8
)

_BOTH = "forward_backward"
_TO_DENSE = time_ratio(_BOTH, "auto", "dense")
_TO_COMPILED = time_ratio(_BOTH, "auto", COMPILED_DST)
_TO_EAGER = time_ratio(_BOTH, "auto", "dst_eager")

LAYER_GOALS = (
    Goal("forward+backward ÷ dense, mean", 1.00, _ALL, _TO_DENSE, mean=True),
    Goal("forward+backward ÷ dense, worst", 1.08, _ALL, _TO_DENSE),
    Goal("forward+backward ÷ best compiled DST, mean", 0.93, _ALL, _TO_COMPILED, mean=True),
    Goal("forward+backward ÷ best compiled DST, worst", 1.02, _ALL, _TO_COMPILED),
    Goal("forward+backward ÷ eager DST up to 8k tokens, worst", 0.50, _UP_TO_8K, _TO_EAGER),
    Goal("pack from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, bandwidth("forward"), True),
    Goal("post from 16 M weights, of copy bandwidth", 0.90, _FROM_16M, bandwidth("backward"), True),
    Goal(
        "fused dW at 8k tokens, of cuBLAS",
        0.90,
        _AT_8K,
        speed("grad_weight", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused dW of 1x1 and small-image convolutions ÷ packed, worst",
        1.00,
        _SMALL_CONVS,
        time_ratio("grad_weight", "fused", "packed"),
    ),
    Goal(
        "fused forward in tf32, of cuBLAS",
        0.85,
        _TF32,
        speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "fused forward with bf16 parameters, of cuBLAS",
        0.85,
        _BF16,
        speed("forward", "fused", "gemm"),
        at_least=True,
    ),
    Goal(
        "peak memory of forward+backward ÷ dense, worst",
        1.00,
        _ALL,
        ratio(_BOTH, "memory", "auto", "dense"),
    ),
    Goal("saved for backward ÷ one masked copy, worst", 1.00, _ALL, _saved_over_allowed),
    Goal(
        "host cost of forward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        ratio("forward", "host_time", "auto", "dense"),
    ),
    Goal(
        "host cost of forward+backward ÷ dense, worst",
        1.50,
        _UP_TO_1K,
        ratio(_BOTH, "host_time", "auto", "dense"),
    ),
)
