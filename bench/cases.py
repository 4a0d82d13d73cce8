"""What is measured, as data: cases, and suites of them in order of priority."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError, require_one_of
from .modes import MODES, Mode

__all__ = ["MASKED_WEIGHT", "OPS", "SUITES", "Case", "Suite", "suite_named"]

LINEAR = "linear"
MASKED_WEIGHT = "masked_weight"
OPS = (LINEAR, MASKED_WEIGHT)

# Up to this share the collapse guard resets the thresholds, and a case is no longer what it says.
_GUARD = 0.01


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Args:
        op: "linear": input [M, K] times (weight [N, K] * mask)^T plus bias [N];
            "masked_weight": weight * mask in the compute dtype, whose forward is the pack and whose
            backward is the post of the weight-side pipeline (M is 0).
        M: tokens. N: out features. K: in features.
        dtype: a name in `modes.MODES`.
        remaining_ratio: share of the weights that the thresholds keep, above the guard's 0.01.

    Raises UsageError for an unknown op or dtype and for sizes or ratios out of range.
    """

    op: str
    M: int
    N: int
    K: int
    dtype: str
    remaining_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_one_of("op", self.op, list(OPS))
        require_one_of("dtype", self.dtype, list(MODES))
        tokens_fit = self.M == 0 if self.op == MASKED_WEIGHT else self.M > 0
        if not (tokens_fit and self.N > 0 and self.K > 0):
            raise UsageError(
                f"M, N, K are {self.M}, {self.N}, {self.K}. Accepted: positive numbers, and M = 0 "
                f"exactly where op is {MASKED_WEIGHT!r}."
            )
        if not _GUARD < self.remaining_ratio <= 1:
            raise UsageError(
                f"remaining_ratio is {self.remaining_ratio}. Accepted: above {_GUARD}, at most 1."
            )

    @property
    def mode(self) -> Mode:
        return MODES[self.dtype]

    @property
    def name(self) -> str:
        """The case's identity in results: everything it consists of."""
        tokens = f"-m{self.M}" if self.M else ""
        ratio = f"{self.remaining_ratio:g}"
        return f"{self.op}{tokens}-n{self.N}-k{self.K}-{self.dtype}-r{ratio}"


@dataclass(frozen=True)
class Suite:
    """Cases, the most valuable first, so that a run with a time limit gets those.

    `compiled`: how many of them, from the first, are for providers that go through torch.compile,
    too (None: all). A compilation with autotuning takes as long as everything else of many cases.
    """

    name: str
    cases: tuple[Case, ...]
    compiled: int | None = None

    @property
    def compiled_cases(self) -> tuple[Case, ...]:
        return self.cases[: self.compiled]


_TOKENS = (16, 128, 1024, 8192, 65536)
# The shape that most goals speak of first, then from small to large.
_SHAPES = ((4096, 4096), (1024, 1024), (4096, 14336), (14336, 4096), (8192, 8192))
_SIDES = (4096, 8192, 16384, 2048, 1024)  # of square weights: 1 M to 256 M, those of goals first


def _linear(M: int, N: int, K: int, dtype: str) -> Case:
    return Case(LINEAR, M, N, K, dtype)


def _weights(N: int, K: int, dtype: str) -> Case:
    return Case(MASKED_WEIGHT, 0, N, K, dtype)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "smoke",
            (
                _linear(128, 1024, 1024, "bf16-autocast"),
                _weights(1024, 1024, "bf16-autocast"),
                _linear(100, 1000, 520, "bf16-autocast"),  # no tile divides these
                _linear(1024, 1024, 1024, "fp16-autocast"),
            ),
            compiled=0,
        ),
        Suite(
            "streaming",
            (
                *(_weights(side, side, "bf16-autocast") for side in _SIDES),
                _weights(4096, 4096, "bf16"),
            ),
            compiled=1,
        ),
        Suite(
            "linear",
            (
                *(_linear(M, *_SHAPES[0], "bf16-autocast") for M in _TOKENS),
                _linear(4096, 4096, 4096, "tf32"),
                _linear(4096, 4096, 4096, "bf16"),
                *(_linear(M, *shape, "bf16-autocast") for shape in _SHAPES[1:] for M in _TOKENS),
            ),
        ),
        Suite(
            "cpu",
            (
                _linear(32, 96, 64, "bf16-autocast"),
                _weights(128, 96, "bf16-autocast"),
                _linear(32, 96, 64, "fp32"),
                _linear(33, 70, 50, "bf16"),
            ),
            compiled=2,
        ),
    )
}


def suite_named(name: str) -> Suite:
    """Raises UsageError for an unknown name."""
    require_one_of("--suite", name, list(SUITES))
    return SUITES[name]
