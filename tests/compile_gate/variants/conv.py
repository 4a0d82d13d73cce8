"""The convolutions' kernels: images and weights channels last.

Other memory formats compile to slower code of the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from dst_kernels.backends.triton.conv_grad_weight import conv_grad_weight_kernel, conv_slabs_kernel
from dst_kernels.backends.triton.conv_product import (
    Filters,
    Image,
    KernelGeometry,
    conv_product_kernel,
)
from dst_kernels.backends.triton.masking import SURROGATE_CODES, Rule
from dst_kernels.backends.triton.matrix import Strided
from dst_kernels.backends.triton.tiles import Traits, conv_grad_weight_tiles, conv_product_tiles

from .base import (
    PARTIAL_SUMS,
    SIZES,
    Variant,
    grad_weight_tile,
    granularities,
    is_of_ampere,
    matrix,
    pointer,
    product_tile,
)

__all__ = ["convolutions"]


def convolutions(architecture: int) -> Iterator[Variant]:
    """All of them."""
    yield from _products(architecture)
    yield from _grad_weights(architecture)


_GEOMETRY = KernelGeometry(*["i32"] * len(KernelGeometry._fields))._replace(**SIZES)


def _image(dtype: str) -> Image:
    return Image(pointer(dtype), "i32:16", 1, "i32:16", "i32:16")


def _filters(of_tap: Strided) -> Filters:
    start, *strides = of_tap
    return Filters(start, *strides, "i32:16", "i32:16", "i32:16")


# Stored weight, activations, whether float32 may round to TF32. fp16 compiles to the code of bf16.
_DTYPES = (
    ("fp32", "bf16", False),
    ("bf16", "bf16", False),
    ("fp32", "fp16", False),
    ("fp32", "fp32", True),
    ("fp32", "fp32", False),
)
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cases(architecture: int, tiles: Callable[[Traits], Sequence]) -> Iterator[tuple]:
    """(tile, weight, activations, PRECISION, whether on tensor cores, whether the largest)."""
    for weight, x, tf32 in _DTYPES:
        traits = Traits(_TORCH[x], tf32, hopper=architecture == 90)
        if architecture == 80 and not is_of_ampere(weight, x, traits.precision):
            continue
        of_traits = tiles(traits)
        for tile in of_traits[-1:] if x == "fp16" or architecture == 80 else of_traits:
            largest = tile is of_traits[-1]
            yield tile, weight, x, traits.precision, traits.tensor_cores, largest


def _products(architecture: int) -> Iterator[Variant]:
    for tile, weight, x, precision, tensor_cores, largest in _cases(
        architecture, conv_product_tiles
    ):
        for purpose in ("forward", "grad_input"):
            by_input = purpose == "grad_input"
            for granularity, (axis, threshold) in granularities(by_input).items():
                rare = (weight, x) != ("fp32", "bf16") or not largest
                if granularity == "layer" or (granularity == "element" and rare):
                    continue
                yield Variant(
                    f"conv {purpose} {weight}->{x} {precision} {granularity} {tile}",
                    conv_product_kernel,
                    {
                        "x": pointer(x),
                        "weight": pointer(weight),
                        "threshold": pointer("fp32"),
                        "bias": None if by_input else pointer("fp32"),
                        "out": pointer(x),
                        "geometry": _GEOMETRY,
                        "stride_x": _image(x)[1:],
                        "stride_w": _filters(matrix(weight, transposed=by_input))[1:],
                        "stride_t": _filters(threshold)[1:],
                        "stride_o": _image(x)[1:],
                        "THRESHOLD": axis,
                        "TILE": product_tile(tile, precision),
                    },
                    tile.warps,
                    tile.stages,
                    tensor_cores=tensor_cores,
                    operand_a_in_registers=tensor_cores,
                )


def _grad_weights(architecture: int) -> Iterator[Variant]:
    """With the epilogue, and slabs; the surrogates differ only where the linear layer's do."""
    for tile, weight, x, precision, tensor_cores, largest in _cases(
        architecture, conv_grad_weight_tiles
    ):
        common = {"grad": _image(x), "x": _image(x), "geometry": _GEOMETRY}
        options = {"warps": tile.warps, "stages": tile.stages, "tensor_cores": tensor_cores}
        for granularity, (axis, threshold) in granularities(False).items():
            rare = (weight, x) != ("fp32", "bf16") or not largest
            if granularity == "layer" or (granularity == "element" and rare):
                continue
            dt = threshold if granularity == "element" else PARTIAL_SUMS
            yield Variant(
                f"conv grad_weight {weight},{x} {precision} {granularity} {tile}",
                conv_grad_weight_kernel,
                {
                    **common,
                    "weight": _filters(matrix(weight)),
                    "threshold": _filters(threshold),
                    "grad_weight": _filters(matrix(weight)),
                    "grad_threshold": _filters(dt),
                    "RULE": Rule(axis, SURROGATE_CODES["long_tailed"], True),
                    "TILE": grad_weight_tile(tile, precision),
                },
                **options,
            )
        if weight == x and x != "fp32":
            continue
        yield Variant(
            f"conv slabs {x} {precision} {tile}",
            conv_slabs_kernel,
            {
                "grad": pointer(x),
                "x": pointer(x),
                "slabs": "*fp32",
                "steps": "i32",
                "geometry": _GEOMETRY,
                "stride_g": _image(x)[1:],
                "stride_x": _image(x)[1:],
                "stride_s": _filters(matrix("fp32"))[1:],
                "TILE": grad_weight_tile(tile, precision),
            },
            **options,
        )
