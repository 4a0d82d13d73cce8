"""Arguments for the Triton kernels, and what must hold of every call."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import pytest
import torch
from ops.tolerance import TF32Products, assert_as_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dst_kernels import ops, reference
from dst_kernels.backends.device import tf32_allowed
from dst_kernels.reference.conv import Geometry

pytest.importorskip("triton.language")  # not `triton`: this folder would pass for it

GRANULARITIES = ("row", "scalar", "layer", "element")
SURROGATES = ("long_tailed", "rectangular", "triangular", "straight_through")

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
# A scalar threshold comes to the kernels as one of a layer does.
every_axis = pytest.mark.parametrize("granularity", ("row", "layer", "element"))


def crossed(names: Sequence[str], first: Mapping[str, tuple], second: Mapping[str, tuple]):
    """Parametrized by all combinations, of which each of `first` has one that is not slow."""
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *first[one], *second[other], id=f"{one}-{other}",
                marks=[pytest.mark.slow] * (i % len(second) != j),
            )
            for i, one in enumerate(first)
            for j, other in enumerate(second)
        ],
    )  # fmt: skip


# The interpreter's bfloat16 products are wrong, and its casts to it do not round.
on_gpu = pytest.mark.gpu


def normal(*shape: int, dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def thresholds(shape, granularity: str, *, dtype=torch.float32, device="cpu") -> Tensor:
    """Of all signs, most of them positive and small enough to keep half the weights."""
    sizes = {"row": shape[:1], "scalar": (), "layer": (1,), "element": shape}[granularity]
    drawn = 1.2 * torch.rand(tuple(sizes), dtype=torch.float64) - 0.1
    if drawn.numel() == 1:
        drawn.fill_(0.6)
    return drawn.to(device, dtype)


def gradient_along(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random, but for the most part with the weight's sign.

    The sum over a layer would else be a small difference of large numbers, in which the error of a
    single result says nothing.
    """
    drawn = torch.randn(weight.shape, dtype=torch.float64).to(weight.device)
    return ((drawn + 1.5) * weight.double().sign()).to(dtype)


def run(name: str, *args, backend: str = "triton"):
    """The op's results as a tuple; the arguments stay as they were, fakes say what comes out."""
    op = getattr(ops, name)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    results = op(*args, backend)
    results = results if isinstance(results, tuple) else (results,)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert tensor._version == version
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    addresses = {tensor.data_ptr() for tensor in tensors if tensor.numel()}
    with FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), backend)
    fakes = fakes if isinstance(fakes, tuple) else (fakes,)
    for result, fake in zip(results, fakes, strict=True):
        assert result.data_ptr() not in addresses, "results are new memory"
        assert (result.shape, result.dtype) == (fake.shape, fake.dtype)
        assert result.device == fake.device
        assert significant(result) == significant(fake)
    return results


def significant(tensor: Tensor) -> list[int]:
    """Strides of dimensions in which something can be skipped."""
    if tensor.numel() == 0:
        return []
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def by_reference(name: str, *args):
    """Return the reference's result for the arguments of an op, a convolution's geometry flat."""
    if name.startswith("masked_conv"):
        start = 5 if name == "masked_conv" else 4
        args = *args[:start], Geometry(*args[start : start + 4]), *args[start + 4 :]
    return getattr(reference, name)(*args)


def exactly(name: str, *args):
    """The reference's results in float64, where 16-bit and float32 arguments are exact."""
    wide = [
        arg.double() if isinstance(arg, Tensor) else torch.float64 if isinstance(arg, torch.dtype)
        else arg
        for arg in args
    ]  # fmt: skip
    results = by_reference(name, *wide)
    return results if isinstance(results, tuple) else (results,)


def check(name: str, *args) -> tuple[Tensor, ...]:
    """Run the op on Triton: as accurate as the reference, which is plain PyTorch."""
    ours = run(name, *args)
    tf32 = args[0].is_cuda and tf32_allowed(convolution=name.startswith("masked_conv"))
    with TF32Products() if tf32 else contextlib.nullcontext():
        plain = by_reference(name, *args)
    plain = plain if isinstance(plain, tuple) else (plain,)
    for result, close, exact in zip(ours, plain, exactly(name, *args), strict=True):
        assert_as_accurate(result, close, exact)
    return ours


def same(ours: tuple[Tensor, ...], expected) -> None:
    """Equal bit by bit, but for the sign of zeros and the payload of NaNs."""
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)
