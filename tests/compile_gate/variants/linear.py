"""The linear layer's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import triton.language as tl

from dst_kernels.backends.triton.grad_weight import grad_weight_kernel, slabs_kernel
from dst_kernels.backends.triton.masking import ELEMENT, SURROGATE_CODES
from dst_kernels.backends.triton.product import finish_kernel, product_kernel
from dst_kernels.backends.triton.tiles import (
    FLOAT32_GRAD_WEIGHT_TILES,
    FLOAT32_PRODUCT_TILES,
    GRAD_WEIGHT_TILES,
    MORE_GRAD_WEIGHT_TILES,
    MORE_PRODUCT_TILES,
    PRODUCT_TILES,
    SLAB_TILE,
    TF32_GRAD_WEIGHT_TILES,
    TF32_SLAB_TILE,
    GradWeightTile,
    ProductTile,
)

from .base import (
    AUTOCAST,
    FLOAT32,
    SIXTEEN_BIT,
    Variant,
    granularities,
    is_of_ampere,
    unit_strides,
    variant,
)

__all__ = ["linear"]


def linear(architecture: int) -> Iterator[Variant]:
    """All of them."""
    yield from _products(_product_cases(architecture))
    yield from _finishes(architecture)
    yield from _grad_weights(_grad_weight_cases(architecture))
    yield from _slabs(architecture)
    if architecture == 90:
        yield from _more()


class _ProductCase(NamedTuple):
    """`largest` of the tiles: what only leaves something out of another is compiled in that."""

    tile: ProductTile
    weight: str
    x: str
    precision: str
    tensor_cores: bool
    largest: bool


def _product_cases(architecture: int) -> Iterator[_ProductCase]:
    for tiles, dtypes, precision in (
        (PRODUCT_TILES[architecture], (*AUTOCAST, *SIXTEEN_BIT), "ieee"),
        (PRODUCT_TILES[architecture], FLOAT32, "tf32"),
        (FLOAT32_PRODUCT_TILES, FLOAT32, "ieee"),
    ):
        for tile in tiles:
            largest = tile is tiles[-1]
            for weight, x in dtypes:
                if x == "fp16" and not largest:
                    continue  # the code of bf16
                if architecture == 80 and not (largest and is_of_ampere(weight, x, precision)):
                    continue
                tensor_cores = x != "fp32" or precision == "tf32"
                yield _ProductCase(tile, weight, x, precision, tensor_cores, largest)


def _with_elements(tile: ProductTile, weight: str, x: str, largest: bool) -> bool:
    """Whether to compile this with a threshold for each weight, which is rare: at both ends."""
    return x == "bf16" and (largest or (weight == "fp32" and tile.block_m == 16))


def _grad_weight_cases(architecture: int) -> Iterator[tuple[GradWeightTile, str, str, str, bool]]:
    for tiles, dtypes, precision in (
        (GRAD_WEIGHT_TILES[architecture], (*AUTOCAST, *SIXTEEN_BIT), "ieee"),
        (TF32_GRAD_WEIGHT_TILES, FLOAT32, "tf32"),
        (FLOAT32_GRAD_WEIGHT_TILES, FLOAT32, "ieee"),
    ):
        for tile in tiles:
            largest = tile is tiles[-1]
            for weight, x in dtypes:
                if x == "fp16" and not largest:
                    continue  # the code of bf16
                if architecture == 80 and not (largest and is_of_ampere(weight, x, precision)):
                    continue
                yield tile, weight, x, precision, x != "fp32" or precision == "tf32"


def _product_constants(tile: ProductTile, precision: str, transposed: bool) -> dict[str, object]:
    return {
        "PRECISION": precision,
        "TRANSPOSED": transposed,
        "INDEX": tl.int32,
        "BLOCK_M": tile.block_m,
        "BLOCK_R": tile.block_r,
        "BLOCK_C": tile.block_c,
        "UNROLL": tile.unroll,
        "GROUP": tile.group,
        **unit_strides("xc", "wr" if transposed else "wc"),
    }


def _products(cases: Iterable[_ProductCase]) -> Iterator[Variant]:
    """Forward with and without the guard's count, and dX; whole sums and split ones."""
    for tile, weight, x, precision, tensor_cores, largest in cases:
        for purpose in ("forward", "unguarded", "grad_input"):
            if purpose == "unguarded" and not largest:
                continue
            transposed = purpose == "grad_input"
            for granularity, (axis, unit) in granularities(transposed).items():
                if granularity == "layer":
                    continue  # its threshold is read as one for each row
                if granularity == "element" and not _with_elements(tile, weight, x, largest):
                    continue
                for split in (False, True):
                    of_another = granularity != "row" or x == "fp16" or purpose == "unguarded"
                    if split and (of_another or not largest):
                        continue
                    yield variant(
                        f"{purpose}{' split' if split else ''} {weight}->{x} {precision} "
                        f"{granularity} {tile}",
                        product_kernel,
                        {
                            "x": x,
                            "weight": weight,
                            "threshold": "fp32",
                            "bias": "fp32",
                            "out": "fp32" if split else x,
                            "pruned_counts": "i32",
                        },
                        {
                            **_product_constants(tile, precision, transposed),
                            **unit,
                            "THRESHOLD": axis,
                            "COUNT": purpose == "forward",
                            "HAS_BIAS": not transposed and not split,
                        },
                        warps=tile.warps,
                        stages=tile.stages,
                        tensor_cores=tensor_cores,
                        operand_a_in_registers=tensor_cores,
                    )


def _finishes(architecture: int) -> Iterator[Variant]:
    """Of the forward pass: guard alone, guard and split; of dX: split alone.

    Its product runs where a layer has collapsed, so rarely that the largest tile stands for all.
    """
    for tile, weight, x, precision, tensor_cores, largest in _product_cases(architecture):
        for guard, split in ((True, False), (True, True), (False, True)):
            if x == "fp16" or not largest or (not guard and weight == x == "bf16"):
                continue
            purpose = " ".join(["finish", *["guard"] * guard, *["split"] * split])
            yield variant(
                f"{purpose} {weight}->{x} {precision} {tile}",
                finish_kernel,
                {
                    "x": x,
                    "weight": weight,
                    "slabs": "fp32" if split else x,
                    "bias": "fp32",
                    "out": x,
                    "effective": "fp32",
                    "pruned_counts": "i32",
                },
                {
                    **_product_constants(tile, precision, False),
                    "GUARD": guard,
                    "SPLIT": split,
                    "HAS_BIAS": guard,
                    "COUNTS": 1024,
                },
                warps=tile.warps,
                stages=tile.stages,
                tensor_cores=tensor_cores and guard,
                operand_a_in_registers=tensor_cores and guard,
            )


def _grad_weights(cases: Iterable[tuple]) -> Iterator[Variant]:
    for tile, weight, x, precision, tensor_cores in cases:
        for granularity, (axis, unit) in granularities(False).items():
            for surrogate, code in SURROGATE_CODES.items():
                special = granularity != "row" or surrogate != "long_tailed"
                if special and (weight, x, tile.block_c) != ("fp32", "bf16", 128):
                    continue
                if granularity != "row" and surrogate != "long_tailed":
                    continue
                yield variant(
                    f"grad_weight {weight},{x} {precision} {granularity} {surrogate} {tile}",
                    grad_weight_kernel,
                    {
                        "grad": x,
                        "x": x,
                        "weight": weight,
                        "threshold": "fp32",
                        "grad_weight": weight,
                        "grad_threshold": "fp32",
                    },
                    {
                        **unit_strides("gr", "xc", "wc", "oc", *(["hc"] * (axis == ELEMENT.value))),
                        **unit,
                        "THRESHOLD": axis,
                        "SURROGATE": code,
                        "STRUCTURE_GRADIENT": True,
                        "PRECISION": precision,
                        "INDEX": tl.int32,
                        "BLOCK_R": tile.block_r,
                        "BLOCK_C": tile.block_c,
                        "BLOCK_M": tile.block_m,
                        "GROUP": tile.group,
                        "PIECES": tile.pieces,
                    },
                    warps=tile.warps,
                    stages=tile.stages,
                    tensor_cores=tensor_cores,
                )


def _slabs(architecture: int) -> Iterator[Variant]:
    for tile, x, precision, tensor_cores in (
        (SLAB_TILE, "bf16", "ieee", True),
        (SLAB_TILE, "fp16", "ieee", True),
        (TF32_SLAB_TILE, "fp32", "tf32", True),
        *((tile, "fp32", "ieee", False) for tile in FLOAT32_GRAD_WEIGHT_TILES),
    ):
        if architecture == 80 and not is_of_ampere("fp32", x, precision):
            continue
        yield variant(
            f"slabs {x} {precision} {tile}",
            slabs_kernel,
            {"grad": x, "x": x, "slabs": "fp32"},
            {
                **unit_strides("gr", "xc"),
                "PRECISION": precision,
                "INDEX": tl.int32,
                "BLOCK_R": tile.block_r,
                "BLOCK_C": tile.block_c,
                "BLOCK_M": tile.block_m,
                "GROUP": tile.group,
            },
            warps=tile.warps,
            stages=tile.stages,
            tensor_cores=tensor_cores,
        )


def _more() -> Iterator[Variant]:
    """What only tuning can choose, as it is used most: under autocast, with a threshold a row."""
    dtypes = "fp32", "bf16", "ieee", True
    products = (_ProductCase(tile, *dtypes, largest=False) for tile in MORE_PRODUCT_TILES)
    gradients = ((tile, *dtypes) for tile in MORE_GRAD_WEIGHT_TILES)
    for found in (*_products(products), *_grad_weights(gradients)):
        if " row " in found.name and ("grad_weight" not in found.name or "long_t" in found.name):
            yield found
