"""The kinds of cases that can be measured, as data, and the dtype modes they are measured in."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from dst_kernels.training.errors import UsageError, require_one_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mode:
    """A dtype mode: parameters are stored in `weight`, products run in `compute`."""

    name: str
    weight: torch.dtype
    compute: torch.dtype
    tf32: bool = False

    def autocast(self, device_type: str) -> AbstractContextManager:
        """Return the autocast region of a forward, or nothing where weights have `compute`."""
        if self.weight == self.compute:
            return nullcontext()
        # Every call casts as the first of a step does, and no cache leaks into a CUDA graph.
        return torch.autocast(device_type, self.compute, cache_enabled=False)

    @contextmanager
    def precision(self, tune: bool = False) -> Iterator[None]:
        """Set float32 products to TF32 or exact; with `tune`, cuDNN looks for its fastest ones."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=tune, allow_tf32=self.tf32):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


_MODES = (
    Mode("bf16-autocast", torch.float32, torch.bfloat16),
    Mode("bf16", torch.bfloat16, torch.bfloat16),
    Mode("fp16-autocast", torch.float32, torch.float16),
    Mode("tf32", torch.float32, torch.float32, tf32=True),
    Mode("fp32", torch.float32, torch.float32),
)
MODES = {mode.name: mode for mode in _MODES}
FP64 = Mode("fp64", torch.float64, torch.float64)  # for what is right; nothing is timed in it


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure; `form` names its sizes, so that its name can be read back.

    Raises UsageError for a `dtype` that is not in `MODES`, sizes below 1, and a `remaining_ratio`
    (share of the weights that the thresholds keep) beyond 1 or for the collapse guard.
    """

    op: ClassVar[str]
    form: ClassVar[str]
    guard: ClassVar[float] = 0.01  # at or below this share thresholds would change
    dtype: str = "bf16-autocast"
    remaining_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_one_of("dtype", self.dtype, MODES)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise UsageError(f"{field.name} is {value}. Accepted: a positive number.")
        if not self.guard < (ratio := self.remaining_ratio) <= 1:
            accepted = f"above {self.guard}, at most 1"
            raise UsageError(f"remaining_ratio is {ratio}. Accepted: {accepted}.")

    @property
    def mode(self) -> Mode:
        return MODES[self.dtype]

    @property
    def name(self) -> str:
        """Identify the case in results."""
        sizes = self.form.format(**vars(self))
        return f"{self.op}-{sizes}-{self.dtype}-r{self.remaining_ratio:g}"


@dataclass(frozen=True)
class LinearCase(Case):
    """A linear layer: input [M, K] times (weight [N, K] * mask)^T plus bias [N]."""

    op = "linear"
    form = "m{M}-n{N}-k{K}"
    M: int
    N: int
    K: int

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:  # of input, weight and output
        return (self.M, self.K), (self.N, self.K), (self.M, self.N)

    @property
    def arguments(self) -> tuple:  # of the layer's class
        return self.K, self.N


@dataclass(frozen=True)
class ConvCase(Case):
    """A convolution of square images with a square kernel, channels last, without bias.

    `batch` images of `side` pixels and C channels meet N filters; the padding is half the kernel.
    As a matrix product it has M = batch * output positions, and K weights in a filter.
    """

    op = "conv"
    form = "b{batch}-i{side}-c{C}-n{N}-k{kernel}-s{stride}-g{groups}"
    batch: int
    side: int
    C: int
    N: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.C % self.groups or self.N % self.groups:
            of = f"C and N ({self.C}, {self.N})"
            raise UsageError(f"groups is {self.groups}. Accepted: a divisor of {of}.")

    @property
    def output_side(self) -> int:
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def M(self) -> int:
        return self.batch * self.output_side**2

    @property
    def K(self) -> int:
        return self.C // self.groups * self.kernel**2

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        images = (self.batch, self.C, self.side, self.side)
        filters = (self.N, self.C // self.groups, self.kernel, self.kernel)
        return images, filters, (self.batch, self.N, self.output_side, self.output_side)

    @property
    def arguments(self) -> tuple:
        padding, dilation, bias = self.kernel // 2, 1, False
        return self.C, self.N, self.kernel, self.stride, padding, dilation, self.groups, bias


LayerCase = LinearCase | ConvCase


@functools.cache
def _resnet_50() -> tuple[Shape, ...]:
    from torchvision.models import resnet50

    with torch.device("meta"):
        return tuple(tuple(p.shape) for p in resnet50().parameters() if p.dim() > 1)


_SMALL = (96, 64), (8, 3, 3, 3), (16, 8, 1, 1), (33, 70)
WEIGHT_LISTS = {"resnet-50": _resnet_50, "small": lambda: _SMALL}


@dataclass(frozen=True)
class WeightsCase(Case):
    """The weight side alone, of one weight or many in one call: masking them, and their gradients.

    `weights` is a name in `WEIGHT_LISTS` (convolutions' weights lie in memory channels last), or
    "NxK" or "COUNTxNxK" for equal matrices. `list` has their shapes, `numel` how many they hold.
    """

    op = "weights"
    form = "{weights}"
    weights: str

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = r"[1-9]\d*(x[1-9]\d*){1,2}"
        if self.weights not in WEIGHT_LISTS and not re.fullmatch(sizes, self.weights):
            names = ", ".join(WEIGHT_LISTS)
            raise UsageError(f"weights is {self.weights!r}. Accepted: {names}, NxK, COUNTxNxK.")

    @property
    def list(self) -> tuple[Shape, ...]:
        if self.weights in WEIGHT_LISTS:
            return WEIGHT_LISTS[self.weights]()
        *count, rows, columns = map(int, self.weights.split("x"))
        return ((rows, columns),) * (count[0] if count else 1)

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.list))


@dataclass(frozen=True)
class ModelCase(Case):
    """A whole training step: forward, loss, regulariser, backward, optimizer.

    `model` is a name in `networks.MODELS`, which says what is trained on what and by which rule;
    `batch` counts samples, and is the column M of results.
    """

    op = "model"
    form = "{model}-b{batch}"
    model: str
    batch: int

    @property
    def M(self) -> int:
        return self.batch


@dataclass(frozen=True)
class TrainingCase(ModelCase):
    """A training step on some threads of a CPU, which all contenders make in turns."""

    op = "training"
    form = "{model}-b{batch}-t{threads}"
    guard = 0.001
    threads: int = 1


CASES = {kind.op: kind for kind in (LinearCase, ConvCase, WeightsCase, ModelCase, TrainingCase)}
_READ = {"int": ("[0-9]+", int), "float": (r"[0-9]+(?:\.[0-9]+)?", float), "str": (".+", str)}


def case_named(name: str) -> Case:
    """Return the case of that name, of any suite or none; raises UsageError if there is none."""
    if kind := CASES.get(name.partition("-")[0]):
        parts = {field.name: _READ[field.type] for field in dataclasses.fields(kind)}
        parts["dtype"] = "|".join(MODES), str
        groups = {part: f"(?P<{part}>{pattern})" for part, (pattern, _) in parts.items()}
        form = f"{kind.op}-{kind.form}-{{dtype}}-r{{remaining_ratio}}"
        if found := re.fullmatch(form.format(**groups), name):
            return kind(**{part: parts[part][1](text) for part, text in found.groupdict().items()})
    accepted = "names as in the column case of results"
    raise UsageError(f"no case is named {name!r}. Accepted: {accepted}.")
