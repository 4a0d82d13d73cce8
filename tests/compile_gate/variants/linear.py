"""The linear layer's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dst_kernels.backends.triton.grad_weight import grad_weight_kernel, slabs_kernel
from dst_kernels.backends.triton.masking import ELEMENT, SURROGATE_CODES, Rule
from dst_kernels.backends.triton.product import Guard, finish_kernel, product_kernel
from dst_kernels.backends.triton.tiles import (
    FLOAT32_GRAD_WEIGHT_TILES,
    FLOAT32_PRODUCT_TILES,
    GRAD_WEIGHT_TILES,
    MANY_TOKENS_TILE,
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
    PARTIAL_SUMS,
    SIXTEEN_BIT,
    SIZES,
    Variant,
    grad_weight_tile,
    granularities,
    is_of_ampere,
    matrix,
    pointer,
    product_tile,
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
    if architecture == 90:
        for weight, x in (*AUTOCAST, *SIXTEEN_BIT):
            yield _ProductCase(MANY_TOKENS_TILE, weight, x, "ieee", True, largest=False)
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


def _products(cases: Iterable[_ProductCase]) -> Iterator[Variant]:
    """Forward with and without the guard's count, and dX; whole sums and split ones."""
    for tile, weight, x, precision, tensor_cores, largest in cases:
        for purpose in ("forward", "unguarded", "grad_input"):
            if purpose == "unguarded" and not (largest or tile is MANY_TOKENS_TILE):
                continue
            transposed = purpose == "grad_input"
            for granularity, (axis, threshold) in granularities(transposed).items():
                if granularity == "layer":
                    continue  # its threshold is read as one for each row
                if granularity == "element" and not _with_elements(tile, weight, x, largest):
                    continue
                for split in (False, True):
                    of_another = granularity != "row" or x == "fp16" or purpose == "unguarded"
                    if split and (of_another or not largest):
                        continue
                    yield Variant(
                        f"{purpose}{' split' if split else ''} {weight}->{x} {precision} "
                        f"{granularity} {tile}",
                        product_kernel,
                        {
                            "x": pointer(x),
                            "weight": pointer(weight),
                            "threshold": pointer("fp32"),
                            "bias": None if transposed or split else pointer("fp32"),
                            "out": pointer("fp32" if split else x),
                            "pruned_counts": pointer("i32") if purpose == "forward" else None,
                            "effective": None
                            if transposed or granularity == "element"
                            else pointer("fp32"),
                            "number_of_thresholds": "i32",
                            "M": "i32",
                            "sizes": ("i32:16", "i32:16"),
                            "steps": "i32",
                            "stride_x": matrix(x)[1:],
                            "stride_w": matrix(weight, transposed=transposed)[1:],
                            "stride_t": threshold[1:],
                            "THRESHOLD": axis,
                            "TILE": product_tile(tile, precision),
                        },
                        tile.warps,
                        tile.stages,
                        tensor_cores=tensor_cores,
                        operand_a_in_registers=tensor_cores,
                    )


# At least how many are pruned may exceed 32 bits.
_GUARD = Guard(pointer("i32"), "i64", pointer("fp32"), "i32")


def _finishes(architecture: int) -> Iterator[Variant]:
    """Of the forward pass: guard alone, guard and split; of dX: split alone.

    Its product runs where a layer has collapsed, so rarely that the largest tile stands for all.
    """
    for tile, weight, x, precision, tensor_cores, largest in _product_cases(architecture):
        for guard, split in ((True, False), (True, True), (False, True)):
            if x == "fp16" or not largest or (not guard and weight == x == "bf16"):
                continue
            purpose = " ".join(["finish", *["guard"] * guard, *["split"] * split])
            yield Variant(
                f"{purpose} {weight}->{x} {precision} {tile}",
                finish_kernel,
                {
                    "M": "i32",
                    "sizes": ("i32:16", "i32:16"),
                    "number_of_counts": "i32",
                    "x": matrix(x),
                    "weight": matrix(weight),
                    "slabs": pointer("fp32") if split else None,
                    "bias": pointer("fp32") if guard else None,
                    "out": pointer(x),
                    "guard": _GUARD if guard else None,
                    "parts": "i32",
                    "TILE": product_tile(tile, precision),
                },
                tile.warps,
                1,
                tensor_cores=tensor_cores and guard,
                operand_a_in_registers=tensor_cores and guard,
            )


def _grad_weights(cases: Iterable[tuple]) -> Iterator[Variant]:
    for tile, weight, x, precision, tensor_cores in cases:
        for granularity, (axis, threshold) in granularities(False).items():
            for surrogate, code in SURROGATE_CODES.items():
                special = granularity != "row" or surrogate != "long_tailed"
                if special and (weight, x, tile.block_c) != ("fp32", "bf16", 128):
                    continue
                if granularity != "row" and surrogate != "long_tailed":
                    continue
                element = axis == ELEMENT.value
                yield Variant(
                    f"grad_weight {weight},{x} {precision} {granularity} {surrogate} {tile}",
                    grad_weight_kernel,
                    {
                        **SIZES,
                        "grad": matrix(x),
                        "x": matrix(x),
                        "weight": matrix(weight),
                        "threshold": threshold,
                        "grad_weight": matrix(weight),
                        "grad_threshold": threshold if element else PARTIAL_SUMS,
                        "RULE": Rule(axis, code, True),
                        "TILE": grad_weight_tile(tile, precision),
                    },
                    tile.warps,
                    tile.stages,
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
        yield Variant(
            f"slabs {x} {precision} {tile}",
            slabs_kernel,
            {
                **SIZES,
                "grad": matrix(x),
                "x": matrix(x),
                "slabs": "*fp32",
                "steps": "i32",
                "TILE": grad_weight_tile(tile, precision),
            },
            tile.warps,
            tile.stages,
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
