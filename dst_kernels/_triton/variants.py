"""Every kernel in every configuration that the launchers' defaults can choose, for the gate.

Sizes and addresses are taken as multiples of 16, as in layers worth a GPU: odd ones compile to
slower code of the same kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl

from .grad_weight import grad_weight_kernel, slabs_kernel
from .masking import ALONG_C, ALONG_R, ELEMENT, LAYER, SURROGATE_CODES
from .pack import pack_kernel, settle_kernel
from .post import post_kernel
from .product import finish_kernel, product_kernel
from .tiles import (
    FLOAT32_GRAD_WEIGHT_TILES,
    FLOAT32_PRODUCT_TILES,
    GRAD_WEIGHT_TILES,
    PRODUCT_TILES,
    SLAB_TILE,
    TF32_GRAD_WEIGHT_TILES,
    TF32_SLAB_TILE,
    GradWeightTile,
    ProductTile,
    StreamTile,
    pack_tile,
    post_tile,
)

__all__ = ["Variant", "shipped"]


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration, and what its binary must show."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]  # runtime argument -> Triton's type
    constexprs: dict[str, object]
    warps: int
    stages: int
    aligned: tuple[str, ...]  # arguments divisible by 16
    tensor_cores: bool = False
    operand_a_in_registers: bool = False
    wide_accesses: bool = False
    architectures: tuple[int, ...] = (90, 80)


# Stored weight and activations under autocast, with 16-bit parameters, and in float32.
_AUTOCAST = (("fp32", "bf16"), ("fp32", "fp16"))
_SIXTEEN_BIT = (("bf16", "bf16"), ("fp16", "fp16"))
_FLOAT32 = (("fp32", "fp32"),)

# Integers that are just numbers, so of any divisibility; the last may exceed 32 bits.
_PLAIN = {"number_of_counts", "number_of_thresholds", "slabs", "parts", "least_pruned"}


def shipped() -> list[Variant]:
    """All of them, by unique names."""
    variants = {variant.name: variant for variant in _streams()}
    for architecture in (90, 80):
        for variant in (
            *_products(architecture),
            *_finishes(architecture),
            *_grad_weights(architecture),
            *_slabs(),
        ):
            known = variants.get(variant.name)
            architectures = (*(known.architectures if known else ()), architecture)
            variants[variant.name] = dataclasses.replace(variant, architectures=architectures)
    return list(variants.values())


def _variant(
    name: str,
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    constexprs: dict[str, object],
    *,
    warps: int,
    stages: int,
    **expected: bool,
) -> Variant:
    """What is neither a pointer nor a constant is an integer."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument not in constexprs:
            signature[argument] = "i64" if argument == "least_pruned" else "i32"
    aligned = tuple(argument for argument in signature if argument not in _PLAIN)
    return Variant(name, kernel, signature, constexprs, warps, stages, aligned, **expected)


def _unit(*strides: str) -> dict[str, int]:
    """Strides of 1, which Triton compiles in."""
    return {f"stride_{stride}": 1 for stride in strides}


def _granularities(transposed: bool) -> dict[str, tuple[int, dict[str, int]]]:
    """Name -> (THRESHOLD, strides of 1)."""
    unit = "tr" if transposed else "tc"
    row = (ALONG_C.value, "tc") if transposed else (ALONG_R.value, "tr")
    return {
        "row": (row[0], _unit(row[1])),
        "layer": (LAYER.value, {}),
        "element": (ELEMENT.value, _unit(unit)),
    }


def _product_cases(architecture: int) -> Iterator[tuple[ProductTile, str, str, str, bool]]:
    """(tile, weight, activations, PRECISION, whether on tensor cores)."""
    for tiles, dtypes, precision in (
        (PRODUCT_TILES[architecture], (*_AUTOCAST, *_SIXTEEN_BIT), "ieee"),
        (PRODUCT_TILES[architecture], _FLOAT32, "tf32"),
        (FLOAT32_PRODUCT_TILES, _FLOAT32, "ieee"),
    ):
        for tile in tiles:
            for weight, x in dtypes:
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
        **_unit("xc", "wr" if transposed else "wc"),
    }


def _products(architecture: int) -> Iterator[Variant]:
    """Forward with and without the guard's count, and dX; whole sums and split ones."""
    for tile, weight, x, precision, tensor_cores in _product_cases(architecture):
        for purpose in ("forward", "unguarded", "grad_input"):
            transposed = purpose == "grad_input"
            for granularity, (axis, unit) in _granularities(transposed).items():
                if granularity == "layer" or (granularity == "element" and x != "bf16"):
                    continue  # a layer's threshold is read as one for each row
                for split in (False, True):
                    if split and (granularity != "row" or x == "fp16" or purpose == "unguarded"):
                        continue
                    yield _variant(
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
    """Of the forward pass: guard alone, guard and split; of dX: split alone."""
    for tile, weight, x, precision, tensor_cores in _product_cases(architecture):
        for guard, split in ((True, False), (True, True), (False, True)):
            if x == "fp16" or (weight == x == "bf16" and not guard):
                continue
            purpose = " ".join(["finish", *["guard"] * guard, *["split"] * split])
            yield _variant(
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


def _grad_weight_cases(architecture: int) -> Iterator[tuple[GradWeightTile, str, str, str, bool]]:
    for tiles, dtypes, precision in (
        (GRAD_WEIGHT_TILES[architecture], (*_AUTOCAST, *_SIXTEEN_BIT), "ieee"),
        (TF32_GRAD_WEIGHT_TILES, _FLOAT32, "tf32"),
        (FLOAT32_GRAD_WEIGHT_TILES, _FLOAT32, "ieee"),
    ):
        for tile in tiles:
            for weight, x in dtypes:
                yield tile, weight, x, precision, x != "fp32" or precision == "tf32"


def _grad_weights(architecture: int) -> Iterator[Variant]:
    for tile, weight, x, precision, tensor_cores in _grad_weight_cases(architecture):
        for granularity, (axis, unit) in _granularities(False).items():
            for surrogate, code in SURROGATE_CODES.items():
                special = granularity != "row" or surrogate != "long_tailed"
                if special and (weight, x, tile.block_c) != ("fp32", "bf16", 128):
                    continue
                if granularity != "row" and surrogate != "long_tailed":
                    continue
                yield _variant(
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
                        **_unit("gr", "xc", "wc", "oc", *(["hc"] * (axis == ELEMENT.value))),
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


def _slabs() -> Iterator[Variant]:
    for tile, x, precision in (
        (SLAB_TILE, "bf16", "ieee"),
        (SLAB_TILE, "fp16", "ieee"),
        (TF32_SLAB_TILE, "fp32", "tf32"),
    ):
        yield _variant(
            f"slabs {x} {precision} {tile}",
            slabs_kernel,
            {"grad": x, "x": x, "slabs": "fp32"},
            {
                **_unit("gr", "xc"),
                "PRECISION": precision,
                "INDEX": tl.int32,
                "BLOCK_R": tile.block_r,
                "BLOCK_C": tile.block_c,
                "BLOCK_M": tile.block_m,
                "GROUP": tile.group,
            },
            warps=tile.warps,
            stages=tile.stages,
            tensor_cores=True,
        )


def _streams() -> Iterator[Variant]:
    """pack, its second launch, and post, for long rows and short ones."""
    for columns in (4096, 256):
        tile, of_post = pack_tile(columns, 1), post_tile(columns, 1)
        for weight, packed in (*_AUTOCAST, *_SIXTEEN_BIT, *_FLOAT32):
            for granularity, (axis, unit) in _granularities(False).items():
                if granularity != "row" and (weight, packed) != ("fp32", "bf16"):
                    continue
                if packed == "fp16" and columns != 4096:
                    continue
                element = axis == ELEMENT.value
                for write in (True, False):
                    if not write and packed != weight:
                        continue
                    constants = {
                        **_blocks(tile),
                        **_unit("wc", "pc", *(["ec"] if element else ["er"] if axis else [])),
                        "THRESHOLD": axis,
                        "WRITE": write,
                    }
                    pointers = {
                        "weight": weight,
                        "packed": packed,
                        "effective": "fp32",
                        "pruned_counts": "i32",
                    }
                    purpose = f"{weight}->{packed}" if write else weight
                    name = f"{purpose} {granularity} {tile}"
                    yield _variant(
                        f"{'pack' if write else 'count'} {name}",
                        pack_kernel,
                        {**pointers, "threshold": "fp32"},
                        {**constants, **unit},
                        warps=tile.warps,
                        stages=tile.stages,
                        wide_accesses=True,
                    )
                    yield _variant(
                        f"settle {name}",
                        settle_kernel,
                        pointers,
                        {**constants, "COUNTS": 1024},
                        warps=tile.warps,
                        stages=tile.stages,
                    )
                yield _variant(
                    f"post {packed},{weight} {granularity} {of_post}",
                    post_kernel,
                    {
                        "dense": packed,
                        "weight": weight,
                        "threshold": "fp32",
                        "grad_weight": weight,
                        "grad_threshold": "fp32",
                    },
                    {
                        **_blocks(of_post),
                        **_unit("dc", "wc", "gc", *(["hc"] if element else [])),
                        **unit,
                        "THRESHOLD": axis,
                        "SURROGATE": 0,
                        "STRUCTURE_GRADIENT": True,
                    },
                    warps=of_post.warps,
                    stages=of_post.stages,
                    wide_accesses=True,
                )


def _blocks(tile: StreamTile) -> dict[str, object]:
    return {"COMPUTE": tl.float32, "ROWS": tile.rows, "BLOCK": tile.block}
