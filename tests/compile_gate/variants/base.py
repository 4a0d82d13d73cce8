"""What a variant is, and what making one takes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from dst_kernels.backends.triton.grad_weight import compiled_tile
from dst_kernels.backends.triton.launch import CompiledTile
from dst_kernels.backends.triton.masking import ALONG_C, ALONG_R, ELEMENT, LAYER
from dst_kernels.backends.triton.matrix import Strided
from dst_kernels.backends.triton.tiles import GradWeightTile, ProductTile

__all__ = [
    "AUTOCAST",
    "FLOAT32",
    "PARTIAL_SUMS",
    "SIXTEEN_BIT",
    "SIZES",
    "Variant",
    "grad_weight_tile",
    "granularities",
    "is_of_ampere",
    "matrix",
    "pointer",
    "product_tile",
]


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration, and what its binary must show."""

    name: str
    kernel: triton.JITFunction
    arguments: dict[str, object]
    """As in a launch, but with types for tensors and numbers; these are spelled as in
    `triton.tools.compile`: "i32:16" is divisible by 16. What is not a type is compiled in."""
    warps: int
    stages: int
    tensor_cores: bool = False
    operand_a_in_registers: bool = False
    wide_accesses: bool = False
    architectures: tuple[int, ...] = (90, 80)


# Stored weight and activations under autocast, with 16-bit parameters, and in float32.
AUTOCAST = (("fp32", "bf16"), ("fp32", "fp16"))
SIXTEEN_BIT = (("bf16", "bf16"), ("fp16", "fp16"))
FLOAT32 = (("fp32", "fp32"),)


def is_of_ampere(weight: str, x: str, precision: str) -> bool:
    """Whether kernels are compiled for Ampere with these dtypes, too."""
    return weight == "fp32" and (x == "bf16" or precision == "tf32")


# Of a product's matrices: the number of tokens varies, and is not specialised.
SIZES = {"M": "i32", "R": "i32:16", "C": "i32:16"}


def pointer(dtype: str) -> str:
    return f"*{dtype}:16"


def matrix(dtype: str, *, transposed: bool = False) -> Strided:
    """With contiguous rows, or columns."""
    strides = (1, "i32:16") if transposed else ("i32:16", 1)
    return Strided(pointer(dtype), *strides)


# Of the gradient of thresholds that are not element-wise.
PARTIAL_SUMS = Strided(pointer("fp32"), "i32:16", "i32:16")


def product_tile(tile: ProductTile, precision: str) -> CompiledTile:
    blocks = tile.block_m, tile.block_r, tile.block_c, tile.group
    return CompiledTile(precision, tl.int32, *blocks, unroll=tile.unroll)


def grad_weight_tile(tile: GradWeightTile, precision: str) -> CompiledTile:
    return compiled_tile(tile, precision, 0)


def granularities(transposed: bool) -> dict[str, tuple[int, Strided]]:
    """Name -> (THRESHOLD, thresholds)."""
    along_rows = ALONG_C.value if transposed else ALONG_R.value
    return {
        "row": (along_rows, matrix("fp32", transposed=not transposed)),
        "layer": (LAYER.value, Strided(pointer("fp32"), "i32:16", "i32:16")),
        "element": (ELEMENT.value, matrix("fp32", transposed=transposed)),
    }
