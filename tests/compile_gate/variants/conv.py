"""The convolutions' kernels: images and weights channels last.

Other memory formats compile to slower code of the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton.language as tl

from dst_kernels.backends.triton.conv_grad_weight import conv_grad_weight_kernel, conv_slabs_kernel
from dst_kernels.backends.triton.conv_product import conv_product_kernel
from dst_kernels.backends.triton.masking import ALONG_C, ALONG_R, ELEMENT, SURROGATE_CODES
from dst_kernels.backends.triton.tiles import Traits, conv_grad_weight_tiles, conv_product_tiles

from .base import Variant, is_of_ampere, unit_strides, variant

__all__ = ["convolutions"]


def convolutions(architecture: int) -> Iterator[Variant]:
    """All of them."""
    yield from _products(architecture)
    yield from _grad_weights(architecture)


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
            for granularity, axis in (
                ("row", ALONG_C if by_input else ALONG_R),
                ("element", ELEMENT),
            ):
                if granularity == "element" and ((weight, x) != ("fp32", "bf16") or not largest):
                    continue
                strides = ["wr" if by_input else "wc", "xc", "or"]
                if granularity == "row":
                    strides += ["tc" if by_input else "tr"]
                else:
                    strides += ["tr" if by_input else "tc"]
                yield variant(
                    f"conv {purpose} {weight}->{x} {precision} {granularity} {tile}",
                    conv_product_kernel,
                    {"x": x, "weight": weight, "threshold": "fp32", "bias": "fp32", "out": x},
                    {
                        **unit_strides(*strides),
                        "THRESHOLD": axis.value,
                        "HAS_BIAS": not by_input,
                        "PRECISION": precision,
                        "TRANSPOSED": by_input,
                        "INDEX": tl.int32,
                        "BLOCK_M": tile.block_m,
                        "BLOCK_R": tile.block_r,
                        "BLOCK_C": tile.block_c,
                        "UNROLL": tile.unroll,
                        "GROUP": tile.group,
                    },
                    warps=tile.warps,
                    stages=tile.stages,
                    tensor_cores=tensor_cores,
                    operand_a_in_registers=tensor_cores,
                )


def _grad_weights(architecture: int) -> Iterator[Variant]:
    """With the epilogue, and slabs; the surrogates differ only where the linear layer's do."""
    for tile, weight, x, precision, tensor_cores, largest in _cases(
        architecture, conv_grad_weight_tiles
    ):
        constants = {
            **unit_strides("gr", "xc"),
            "PRECISION": precision,
            "INDEX": tl.int32,
            "BLOCK_R": tile.block_r,
            "BLOCK_C": tile.block_c,
            "BLOCK_M": tile.block_m,
            "GROUP": tile.group,
        }
        options = {"warps": tile.warps, "stages": tile.stages, "tensor_cores": tensor_cores}
        for granularity, axis in (("row", ALONG_R), ("element", ELEMENT)):
            element = granularity == "element"
            if element and ((weight, x) != ("fp32", "bf16") or not largest):
                continue
            yield variant(
                f"conv grad_weight {weight},{x} {precision} {granularity} {tile}",
                conv_grad_weight_kernel,
                {
                    "grad": x,
                    "x": x,
                    "weight": weight,
                    "threshold": "fp32",
                    "grad_weight": weight,
                    "grad_threshold": "fp32",
                },
                {
                    **constants,
                    **unit_strides("wc", "oc", *(("tc", "hc") if element else ("tr",))),
                    "THRESHOLD": axis.value,
                    "SURROGATE": SURROGATE_CODES["long_tailed"],
                    "STRUCTURE_GRADIENT": True,
                    "PIECES": tile.pieces,
                },
                **options,
            )
        if weight == x and x != "fp32":
            continue
        yield variant(
            f"conv slabs {x} {precision} {tile}",
            conv_slabs_kernel,
            {"grad": x, "x": x, "slabs": "fp32"},
            {**constants, **unit_strides("sc")},
            **options,
        )
