"""Choose the path of each product of a masked layer from shapes, dtypes and the GPU alone.

The products of a linear layer are y = x (W * M)^T, dX = dY (W * M) and G = dY^T X, from which
dW and dt follow. Each runs *fused* (one kernel reads W and t, masks and multiplies; or multiplies
and makes dW and dt in its epilogue) or *packed* (one pass writes W * M in the compute dtype, or
reads G and W, and the vendor's library multiplies in between). A convolution has the same three.

Costs come from the GPU's table (`tables/`, written by `python -m bench plan` from measurements)
where it has a case nearby. Otherwise those of a linear layer come from a roofline estimate, and a
convolution is packed: the vendor's kernels are hard to beat.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .table import measured_conv_costs, measured_costs

FUSED, PACKED, SPARSE = "fused", "packed", "sparse"


class Plan(NamedTuple):
    """Say how each product runs: "fused", "packed" or "sparse"."""

    forward: str
    grad_input: str
    grad_weight: str


PLANS = {
    "fused": Plan(FUSED, FUSED, FUSED),
    "packed": Plan(PACKED, PACKED, PACKED),
    "mixed": Plan(PACKED, PACKED, FUSED),
    "sparse": Plan(SPARSE, SPARSE, PACKED),
}
PATHS = ("auto", *PLANS)
CONV_TRANSPOSE_PATHS = ("auto", "packed")  # no backend has fused kernels for it


@dataclass(frozen=True)
class Costs:
    """Hold the seconds of each product on each path.

    `packed_forward` includes masking; the backward pass reuses that masked weight.
    """

    fused_forward: float
    packed_forward: float
    fused_grad_input: float
    packed_grad_input: float
    fused_grad_weight: float
    packed_grad_weight: float


class ConvKind(NamedTuple):
    """Hold how convolutions of one size differ.

    A `pointwise` one is a matrix product: kernel and stride of 1, one group, no padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    pointwise: bool


def check_path(path: str, paths: Sequence[str] = PATHS) -> None:
    """Raise ValueError for an unknown name, or one that is not among the `paths` of a layer."""
    if path in paths:
        return
    why = ", since torch multiplies with such weights" if path in PATHS else ""
    raise ValueError(f"path must be one of {', '.join(paths)}, but is {path!r}{why}")


@functools.lru_cache(maxsize=4096)
def plan_linear(
    M: int,
    N: int,
    K: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    gpu: str | None = None,
    tf32: bool = False,
    needs_grad_input: bool = True,
    packed_available: bool = False,
) -> Plan:
    """Return the fastest plan on a GPU for M tokens and a weight [N, K].

    `gpu` is the device's name as torch reports it. `tf32`: float32 products may round to TF32.
    `packed_available`: the masked copy of the weight exists already.
    """
    if torch.float64 in (input_dtype, weight_dtype):
        return PLANS["packed"]  # no tensor-core kernels for it
    costs = _costs(M, N, K, input_dtype, weight_dtype, gpu, tf32)
    return _cheapest(costs, needs_grad_input, packed_available)


@functools.lru_cache(maxsize=4096)
def plan_conv(
    M: int,
    N: int,
    C: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    kind: ConvKind,
    *,
    channels_last: bool,
    gpu: str | None = None,
    tf32: bool = False,
    needs_grad_input: bool = True,
    packed_available: bool = False,
) -> Plan:
    """Return the fastest plan on a GPU for M output positions and a weight [N, C, *kernel].

    `channels_last`: the input has that memory format. All else is as in `plan_linear`.
    """
    exact_float32 = input_dtype == torch.float32 and not tf32
    if torch.float64 in (input_dtype, weight_dtype) or exact_float32:
        return PLANS["packed"]
    if not channels_last or len(kind.kernel) > 2:
        return PLANS["packed"]  # no fused kernels for it
    costs = _conv_costs(M, N, C, input_dtype, weight_dtype, kind, gpu)
    if costs is None:
        return PLANS["packed"]
    return _cheapest(costs, needs_grad_input, packed_available)


def _cheapest(costs: Costs, needs_grad_input: bool, packed_available: bool) -> Plan:
    grad_weight = FUSED if costs.fused_grad_weight < costs.packed_grad_weight else PACKED
    if packed_available:
        return Plan(PACKED, PACKED, grad_weight)
    candidates = {
        (FUSED, FUSED): costs.fused_forward + needs_grad_input * costs.fused_grad_input,
        (PACKED, PACKED): costs.packed_forward + needs_grad_input * costs.packed_grad_input,
        (PACKED, FUSED): costs.packed_forward + needs_grad_input * costs.fused_grad_input,
    }
    return Plan(*min(candidates, key=lambda paths: candidates[paths]), grad_weight)


def _costs(
    M: int,
    N: int,
    K: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    gpu: str | None,
    tf32: bool,
) -> Costs:
    exact_float32 = input_dtype == torch.float32 and not tf32
    if not exact_float32:
        measured = measured_costs(gpu, M, N, K, input_dtype, weight_dtype)
        if measured is not None:
            return Costs(**measured)
    return _estimated_costs(M, N, K, input_dtype, weight_dtype, exact_float32)


def _conv_costs(
    M: int,
    N: int,
    C: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    kind: ConvKind,
    gpu: str | None,
) -> Costs | None:
    """Return measured costs, or None if no similar case was measured."""
    arguments = gpu, M, N, C, input_dtype, weight_dtype
    measured = measured_conv_costs(*arguments, kind.kernel, kind.stride, kind.groups)
    if measured is None and kind.pointwise:
        measured = measured_costs(*arguments)
    return None if measured is None else Costs(**measured)


# -- the estimate ----------------------------------------------------------------------------------

# An H100, whose kernels stream at nine tenths of its 3.35 TB/s. Only ratios matter for the choice,
# and those differ little between GPUs: what decides is how many times a weight is read and written.
_BYTES_PER_SECOND = 3.0e12
_SIXTEEN_BIT_FLOPS = 790e12  # of the vendor's library
_TF32_FLOPS = 390e12
_FLOAT32_FLOPS = 50e12
_LAUNCH = 2e-6
_PACK_LAUNCHES = 1
# The product, and what applies the guard; the small copy of thresholds after them is left out.
_FUSED_FORWARD_LAUNCHES = 2


class _Shares(NamedTuple):
    """Hold which shares of the library's speed the fused products reach."""

    forward: float
    grad_input: float
    grad_weight: float = 0.9  # dense until its epilogue


# Not measured. Weights pass through registers, which convert and mask them before each product: by
# the instructions and the traffic to shared memory of the compiled loops (tile 128 x 128), tensor
# cores can be busy at most 57 % of the time where float32 weights meet 16-bit activations, and 80 %
# in 16 bits alone (dX: 68 %) and in TF32. dX reads the weight across its rows, and so takes more
# instructions.
_CAST = _Shares(forward=0.55, grad_input=0.48)
_SIXTEEN_BIT = _Shares(forward=0.7, grad_input=0.6)
_TF32 = _Shares(forward=0.75, grad_input=0.75)
_FLOAT32 = _Shares(0.5, 0.5, 0.5)  # without tensor cores Triton's products are far behind


def _estimated_costs(
    M: int,
    N: int,
    K: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    exact_float32: bool,
) -> Costs:
    """Return roofline costs: the longer of arithmetic and memory traffic, plus a launch, each."""
    if exact_float32:
        flops, shares = _FLOAT32_FLOPS, _FLOAT32
    elif input_dtype.itemsize == 2:
        flops = _SIXTEEN_BIT_FLOPS
        shares = _SIXTEEN_BIT if weight_dtype.itemsize == 2 else _CAST
    else:
        flops, shares = _TF32_FLOPS, _TF32
    weights = N * K
    activations = M * (N + K) * input_dtype.itemsize
    compute, stored = weights * input_dtype.itemsize, weights * weight_dtype.itemsize
    arithmetic = 2 * M * weights / flops

    def kernel(arithmetic: float, traffic: float, launches: int = 1) -> float:
        return max(arithmetic, traffic / _BYTES_PER_SECOND) + launches * _LAUNCH

    def masked_product(share: float, launches: int = 1) -> float:
        return kernel(arithmetic / share, activations + stored, launches)

    product = kernel(arithmetic, activations + compute)
    grad_weight = kernel(arithmetic / shares.grad_weight, activations + 2 * stored)
    # The fused epilogue overlaps with nothing in its own tile.
    epilogue = 2 * stored / _BYTES_PER_SECOND / 4
    return Costs(
        fused_forward=masked_product(shares.forward, _FUSED_FORWARD_LAUNCHES),
        packed_forward=kernel(0, stored + compute, _PACK_LAUNCHES) + product,
        fused_grad_input=masked_product(shares.grad_input),
        packed_grad_input=product,
        fused_grad_weight=grad_weight + epilogue,
        packed_grad_weight=product + kernel(0, compute + 2 * stored),
    )
