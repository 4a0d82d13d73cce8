"""The CPU library's ops, called on memory full of NaN, and arguments for pack and post."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from dst_kernels import reference
from dst_kernels.backends.compiled.library import BUILT, unavailable

needs_library = pytest.mark.skipif(not BUILT["cpu"], reason="the CPU library was not built")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRANULARITIES = ("row", "layer", "element")
SURROGATES = tuple(range(len(reference.SURROGATES)))
EDGE = 37  # numbers around every tensor; odd, so that no address is aligned

# Rows below and above a block (512) and a unit (32,768), and what is left of them; many and few.
SHAPES = (
    (1, 1), (1, 13), (7, 1), (5, 7), (3, 511), (3, 512), (2, 513), (300, 9), (2, 1100),
    (2, 32768), (2, 32769), (1, 70001), (7,), (4, 3, 3, 3), (6, 5, 3, 2), (3, 2, 2, 2, 2),
    (0, 4), (4, 0),
)  # fmt: skip


def ops():
    """`torch.ops` namespace of the library."""
    assert unavailable("cpu") is None, unavailable("cpu")
    return torch.ops.dst_kernels_compiled


class Memory:
    """Copies of tensors between numbers that must stay as they are: NaN, so that reading shows."""

    def __init__(self) -> None:
        self._edges: list[Tensor] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers and strides; `tensor` must be dense."""
        if tensor.numel() == 0:
            return torch.empty_like(tensor)
        outside = float("nan") if tensor.is_floating_point() else -7
        buffer = torch.full((tensor.numel() + 2 * EDGE,), outside, dtype=tensor.dtype)
        self._edges += [buffer[:EDGE], buffer[-EDGE:]]
        return buffer.as_strided(tensor.shape, tensor.stride(), EDGE).copy_(tensor)

    def copies(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [self.copy(tensor) for tensor in tensors]

    def unwritten(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        filler = float("nan") if (dtype or like.dtype).is_floating_point else -7
        return self.copy(torch.full_like(like, filler, dtype=dtype))

    def check(self) -> None:
        for edge in self._edges:
            untouched = edge.isnan() if edge.is_floating_point() else edge == -7
            assert bool(untouched.all()), "written out of bounds"


def real(dtype: torch.dtype) -> torch.dtype:
    """Of thresholds and of the arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def weights_of(dtype: torch.dtype, shapes: Iterable[Sequence[int]] = SHAPES) -> list[Tensor]:
    """Normal numbers; every second convolution is channels last."""
    made = []
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape).to(dtype)
        if weight.dim() >= 4 and i % 2:
            last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight = weight.contiguous(memory_format=last)
        made.append(weight)
    return made


def threshold_of(weight: Tensor, granularity: str) -> Tensor:
    """Mostly positive; about half of the weights are kept."""
    dtype = real(weight.dtype)
    if granularity == "element":
        return torch.empty_like(weight, dtype=dtype).uniform_(-0.1, 1.3)
    size = [weight.shape[0]] if granularity == "row" else [1]
    return torch.empty(size, dtype=dtype).uniform_(-0.1, 1.3)


def pack(weights, thresholds, settings, dtypes, op=None):
    """(masked, effective, kept, thresholds as the op leaves them); settings: pairs."""
    memory = Memory()
    taken = memory.copies(thresholds)
    masked = [memory.unwritten(w, dtype) for w, dtype in zip(weights, dtypes, strict=True)]
    effective = [memory.unwritten(threshold) for threshold in thresholds]
    kept = memory.unwritten(torch.zeros(len(weights), dtype=torch.int64))
    flat = [int(number) for pair in settings for number in pair]
    (op or ops().pack)(memory.copies(weights), taken, flat, masked, effective, kept)
    memory.check()
    return masked, effective, kept, taken


def post(grads, weights, thresholds, settings):
    """(dW, dt)."""
    memory = Memory()
    of_weights = [memory.unwritten(weight) for weight in weights]
    of_thresholds = [memory.unwritten(threshold) for threshold in thresholds]
    flat = [int(number) for pair in settings for number in pair]
    ops().post(
        memory.copies(grads), memory.copies(weights), memory.copies(thresholds), flat,
        of_weights, of_thresholds,
    )  # fmt: skip
    memory.check()
    return of_weights, of_thresholds


def kept_count(weight: Tensor, threshold: Tensor) -> int:
    return int(reference.threshold_mask(weight, threshold).sum())


def same(ours: Tensor, expected: Tensor) -> None:
    """Equal numbers, NaN in the same places, equal dtypes and strides."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_sums_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, size: Tensor) -> None:
    """At most twice the error of plain PyTorch, or what rounding the summands alone would make.

    `size`: the root of the sum of squares of each sum's summands. Where sums nearly cancel, plain
    PyTorch's error is a matter of luck.
    """
    assert ours.dtype == plain.dtype and ours.shape == plain.shape == exact.shape
    if ours.numel() == 0:
        return
    luck = 2 * (plain.double() - exact).abs().max()
    own = exact.abs() if ours.dtype != torch.float64 else 4 * exact.abs()  # `exact` is rounded too
    allowed = luck + torch.finfo(ours.dtype).eps * (own + 4 * size)
    error = (ours.double() - exact).abs()
    assert bool((error <= allowed).all()), f"error {error.max():.3e}, allowed {allowed.max():.3e}"
