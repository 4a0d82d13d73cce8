"""The CUDA library under test, on a GPU or emulated on the CPU, and arguments for its ops."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from cuda_emulation import build
from torch import Tensor

BAND = 64  # numbers before and after every tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = ("row", "layer", "element")


@dataclass(frozen=True)
class Library:
    """The ops, and where their tensors are."""

    ops: object
    device: torch.device


@functools.cache
def emulated() -> Library:
    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    torch.ops.load_library(build.build())
    return Library(torch.ops.dst_kernels_emulated, torch.device("cpu"))


@functools.cache
def on_gpu() -> Library:
    from dst_kernels.backends.compiled.library import unavailable

    reason = unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return Library(torch.ops.dst_kernels_compiled, torch.device("cuda"))


LIBRARIES = {"emulated": emulated, "gpu": on_gpu}


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()


class Memory:
    """Copies of tensors on the library's device, each between bands that must stay as they are.

    The bands are NaN, so that whoever reads them shows, too. `shift` moves the tensors by so many
    numbers from an aligned address.
    """

    def __init__(self, library: Library, shift: int = 0):
        self._device = library.device
        self._shift = shift
        self._bands: list[Tensor] = []

    def place(self, tensor: Tensor) -> Tensor:
        """The same numbers and strides; the tensor must be dense."""
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        begin, size = BAND + self._shift, tensor.numel()
        filler = float("nan") if tensor.dtype.is_floating_point else -7
        buffer = torch.full((begin + size + BAND,), filler, dtype=tensor.dtype).to(self._device)
        self._bands += [buffer[:begin], buffer[begin + size :]]
        return buffer.as_strided(tensor.shape, tensor.stride(), begin).copy_(tensor)

    def place_all(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [self.place(tensor) for tensor in tensors]

    def unwritten(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An output of that shape and those strides: numbers that no op writes."""
        filler = float("nan") if (dtype or like.dtype).is_floating_point else -7
        return self.place(torch.full_like(like, filler, dtype=dtype, device="cpu"))

    def check(self) -> None:
        """No kernel has written outside of the tensors."""
        for band in self._bands:
            untouched = band.isnan() if band.dtype.is_floating_point else band == -7
            assert bool(untouched.all()), "written out of bounds"


def threshold_like(weight: Tensor, granularity: str) -> Tensor:
    """Of both signs, most of them positive; half of the weights are kept."""
    rows = weight.shape[0]
    if granularity == "element":
        return torch.empty_like(weight, dtype=torch.float32).uniform_(-0.1, 1.3)
    return torch.empty(rows if granularity == "row" else 1).uniform_(-0.1, 1.3)


SHAPES = (
    (1, 1), (5, 7), (17, 8), (9, 300), (6,), (300,), (3, 1024), (3, 1025), (2, 1032), (5, 2048),
    (2, 4097), (2, 9000), (1, 20000), (4, 3, 3, 3), (16, 8, 3, 3), (0, 4), (4, 0),
)  # fmt: skip


def weights_of(dtype: torch.dtype, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Normal numbers; every second weight of a convolution is channels last."""
    made = []
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape).to(dtype)
        if len(shape) == 4 and i % 2:
            weight = weight.contiguous(memory_format=torch.channels_last)
        made.append(weight)
    return made


def gradient_along(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Random, but for the most part with the weight's sign.

    A threshold's sum would else be a small difference of large numbers, in which the error of a
    single result says nothing.
    """
    return ((torch.randn_like(weight) + 1.5) * weight.sign()).to(dtype)


def same(ours: Tensor, expected: Tensor) -> None:
    """Bit by bit, but for signs of zeros and payloads of NaN."""
    torch.testing.assert_close(
        ours.cpu(), expected, rtol=0, atol=0, equal_nan=True, check_stride=True
    )


def settings_of(entries: Iterable[Iterable[int]]) -> list[int]:
    return [int(number) for entry in entries for number in entry]


def pack(
    library: Library,
    memory: Memory,
    weights: list[Tensor],
    thresholds: list[Tensor],
    settings: list[tuple[int, int]],
    dtypes: list[torch.dtype],
) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """(masked, effective, kept, the thresholds as the op left them)."""
    placed = memory.place_all(thresholds)
    masked = [memory.unwritten(w, dtype) for w, dtype in zip(weights, dtypes, strict=True)]
    effective = [memory.unwritten(threshold) for threshold in thresholds]
    kept = memory.unwritten(torch.zeros(len(weights), dtype=torch.int64))
    library.ops.pack(
        memory.place_all(weights), placed, settings_of(settings), masked, effective, kept
    )
    memory.check()
    return masked, effective, kept, placed


def post(
    library: Library,
    memory: Memory,
    grads: list[Tensor],
    weights: list[Tensor],
    thresholds: list[Tensor],
    settings: list[tuple[int, int]],
) -> tuple[list[Tensor], list[Tensor]]:
    """(dW, dt)."""
    grad_weights = [memory.unwritten(weight) for weight in weights]
    grad_thresholds = [memory.unwritten(threshold) for threshold in thresholds]
    library.ops.post(
        memory.place_all(grads), memory.place_all(weights), memory.place_all(thresholds),
        settings_of(settings), grad_weights, grad_thresholds,
    )  # fmt: skip
    memory.check()
    return grad_weights, grad_thresholds
