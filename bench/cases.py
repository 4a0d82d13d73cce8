"""What is measured, as data: an op at one size, a training step of a model, a list of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from .errors import UsageError, require_one_of
from .models import MODELS
from .modes import MODES, Mode
from .shapes import WEIGHT_LISTS, Shape

__all__ = [
    "CONV",
    "LINEAR",
    "MASKED_WEIGHT",
    "MODEL",
    "OPS",
    "WEIGHT_LIST",
    "AnyCase",
    "Case",
    "ConvCase",
    "LayerCase",
    "ListCase",
    "ModelCase",
    "case_of",
]

LINEAR = "linear"
CONV = "conv"
MASKED_WEIGHT = "masked_weight"
MODEL = "model"
WEIGHT_LIST = "weights"
OPS = (LINEAR, CONV, MASKED_WEIGHT, WEIGHT_LIST, MODEL)

# Up to this share the collapse guard resets the thresholds, and a case is no longer what it says.
_GUARD = 0.01


class _Named:
    """What all kinds of cases share: the dtype's mode, and a name that says all they consist of."""

    op: str
    dtype: str
    remaining_ratio: float

    @property
    def mode(self) -> Mode:
        return MODES[self.dtype]

    @property
    def name(self) -> str:
        """The case's identity in results."""
        return f"{self.op}{self._sizes_in_name()}-{self.dtype}-r{self.remaining_ratio:g}"

    @property
    def sizes(self) -> tuple[str, str, str]:
        """For the columns M, N and K of results; empty where a case has no such size."""
        return "", "", ""

    def _sizes_in_name(self) -> str:
        raise NotImplementedError

    def _check_dtype_and_ratio(self) -> None:
        require_one_of("dtype", self.dtype, list(MODES))
        if not _GUARD < self.remaining_ratio <= 1:
            raise UsageError(
                f"remaining_ratio is {self.remaining_ratio}. Accepted: above {_GUARD}, at most 1."
            )


@dataclass(frozen=True)
class Case(_Named):
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
        require_one_of("op", self.op, [LINEAR, MASKED_WEIGHT])
        tokens_fit = self.M == 0 if self.op == MASKED_WEIGHT else self.M > 0
        if not (tokens_fit and self.N > 0 and self.K > 0):
            raise UsageError(
                f"M, N, K are {self.M}, {self.N}, {self.K}. Accepted: positive numbers, and M = 0 "
                f"exactly where op is {MASKED_WEIGHT!r}."
            )
        self._check_dtype_and_ratio()

    @property
    def sizes(self) -> tuple[str, str, str]:
        return str(self.M or ""), str(self.N), str(self.K)

    @property
    def weight_shape(self) -> Shape:
        return self.N, self.K

    @property
    def input_shape(self) -> Shape | None:
        """None where the op has no input."""
        return (self.M, self.K) if self.op == LINEAR else None

    @property
    def output_shape(self) -> Shape:
        return (self.M, self.N) if self.op == LINEAR else self.weight_shape

    @property
    def layer_options(self) -> dict:
        """What `torch.nn.Linear` is made with."""
        return {"in_features": self.K, "out_features": self.N}

    def _sizes_in_name(self) -> str:
        tokens = f"-m{self.M}" if self.M else ""
        return f"{tokens}-n{self.N}-k{self.K}"


@dataclass(frozen=True)
class ConvCase(_Named):
    """A convolution of square images with a square kernel, channels last, without bias.

    The padding is half the kernel, so that stride 1 keeps an image's size where the kernel is odd.

    Args:
        batch: images. side: of an image, in pixels.
        C: channels of the input. N: filters.
        kernel: its side, in pixels. stride, groups: as in `torch.nn.Conv2d`.
        dtype, remaining_ratio: as in `Case`.

    As a matrix product it has M = batch * output positions, N, and K = weights of a filter.
    Raises UsageError for an unknown dtype and for sizes, groups or ratios out of range.
    """

    batch: int
    side: int
    C: int
    N: int
    kernel: int
    dtype: str
    stride: int = 1
    groups: int = 1
    remaining_ratio: float = 0.1

    op: ClassVar[str] = CONV

    def __post_init__(self) -> None:
        sizes = (self.batch, self.side, self.C, self.N, self.kernel, self.stride, self.groups)
        if min(sizes) < 1 or self.C % self.groups or self.N % self.groups:
            raise UsageError(
                f"batch, side, C, N, kernel, stride, groups are {', '.join(map(str, sizes))}. "
                "Accepted: positive numbers, and groups that divide C and N."
            )
        self._check_dtype_and_ratio()

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def M(self) -> int:
        return self.batch * self.output_side**2

    @property
    def K(self) -> int:
        return self.C // self.groups * self.kernel**2

    @property
    def sizes(self) -> tuple[str, str, str]:
        return str(self.M), str(self.N), str(self.K)

    @property
    def weight_shape(self) -> Shape:
        return self.N, self.C // self.groups, self.kernel, self.kernel

    @property
    def input_shape(self) -> Shape:
        return self.batch, self.C, self.side, self.side

    @property
    def output_shape(self) -> Shape:
        return self.batch, self.N, self.output_side, self.output_side

    @property
    def geometry(self) -> dict[str, int]:
        """What a convolution is called with beside its tensors."""
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}

    @property
    def layer_options(self) -> dict:
        """What `torch.nn.Conv2d` is made with."""
        channels = {"in_channels": self.C, "out_channels": self.N, "kernel_size": self.kernel}
        return {**channels, **self.geometry, "bias": False}

    @classmethod
    def from_name(cls, sizes: str, dtype: str, remaining_ratio: float) -> ConvCase:
        """From the middle of a case's name. Raises UsageError where it is none."""
        found = re.fullmatch(r"b(\d+)-i(\d+)-c(\d+)-n(\d+)-k(\d+)-s(\d+)-g(\d+)", sizes)
        if not found:
            raise UsageError(f"no convolution is named {sizes!r}. Accepted: names in results.")
        batch, side, C, N, kernel, stride, groups = map(int, found.groups())
        return cls(batch, side, C, N, kernel, dtype, stride, groups, remaining_ratio)

    def _sizes_in_name(self) -> str:
        return (
            f"-b{self.batch}-i{self.side}-c{self.C}-n{self.N}"
            f"-k{self.kernel}-s{self.stride}-g{self.groups}"
        )


@dataclass(frozen=True)
class ModelCase(_Named):
    """A whole training step: forward, loss, regulariser, backward, optimizer.

    Args:
        model: a name in `models.MODELS`, which says what is trained on what and by which optimizer.
        batch: samples (images, sequences, tokens) of a step; the column M of results.
        dtype, remaining_ratio: as in `Case`.

    Raises UsageError for an unknown model or dtype and for a batch or ratio out of range.
    """

    model: str
    batch: int
    dtype: str
    remaining_ratio: float = 0.1

    op: ClassVar[str] = MODEL

    def __post_init__(self) -> None:
        require_one_of("model", self.model, list(MODELS))
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}. Accepted: a positive number.")
        self._check_dtype_and_ratio()

    @property
    def sizes(self) -> tuple[str, str, str]:
        return str(self.batch), "", ""

    def _sizes_in_name(self) -> str:
        return f"-{self.model}-b{self.batch}"


@dataclass(frozen=True)
class ListCase(_Named):
    """The weight side of a whole model: all its weights in one call.

    Args:
        weights: a name in `shapes.WEIGHT_LISTS`.
        dtype, remaining_ratio: as in `Case`.

    Raises UsageError for an unknown list or dtype and for a ratio out of range.
    """

    weights: str
    dtype: str
    remaining_ratio: float = 0.1

    op: ClassVar[str] = WEIGHT_LIST

    def __post_init__(self) -> None:
        require_one_of("weights", self.weights, list(WEIGHT_LISTS))
        self._check_dtype_and_ratio()

    @property
    def numel(self) -> int:
        return WEIGHT_LISTS[self.weights].numel

    def _sizes_in_name(self) -> str:
        return f"-{self.weights}"


LayerCase = Case | ConvCase
AnyCase = LayerCase | ModelCase | ListCase


def case_of(name: str, M: str, N: str, K: str, dtype: str, remaining_ratio: str) -> AnyCase:
    """The case of that name, from its name and the columns of results.

    Raises UsageError where there is no such case any more.
    """
    op, _, rest = name.partition("-")
    rest = rest.removesuffix(f"-{dtype}-r{remaining_ratio}")
    ratio = float(remaining_ratio)
    if op == MODEL:
        return ModelCase(rest.removesuffix(f"-b{M}"), int(M), dtype, ratio)
    if op == WEIGHT_LIST:
        return ListCase(rest, dtype, ratio)
    if op == CONV:
        return ConvCase.from_name(rest, dtype, ratio)
    return Case(op, int(M or 0), int(N), int(K), dtype, ratio)
