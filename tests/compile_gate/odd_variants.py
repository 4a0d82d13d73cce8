"""Compiles, and only compiles, every kernel for arguments that the gate does not judge.

Triton compiles an integer argument anew where it is 1, not a multiple of 16, or too large for 32
bits. The interpreter does not, so what breaks there breaks first on a GPU.

What the launchers round up to whole blocks is never 1, and is not made 1 here. It matters: ptxas
12.9.86, which comes with Triton 3.8, ends with a segmentation fault (at -O1 and above) where
`part`, the number of columns and the strides of `x` and of element-wise thresholds are all 1. That
of CUDA 13.0 compiles the same code.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator

import triton.language as tl

from .binary import build, prepare
from .variants import Variant, shipped

PURPOSE = ("pruned_counts", "guard", "slabs", "packed")  # which may be left out
WHOLE_BLOCKS = ("part", "chunk")


def odd_variants() -> list[Variant]:
    """Variants of each kernel and purpose: all integers 1, none aligned, all of 64 bits.

    The last only with the thresholds that take the most arithmetic, which are the last ones.
    """
    found: dict[tuple, dict[int | None, Variant]] = {}
    for variant in shipped():
        if 90 in variant.architectures:
            given = variant.arguments
            tile, rule = given.get("TILE"), given.get("RULE")
            axis = rule.axis if rule else given.get("THRESHOLD")
            purpose = variant.kernel.__name__, *(given.get(name, "") is None for name in PURPOSE)
            by_input = given.get("stride_w", ())[:1] == (1,)
            purpose += (by_input, tile.pieces) if tile else ()
            found.setdefault(purpose, {}).setdefault(axis, variant)
    variants = []
    for by_threshold in found.values():
        for variant in by_threshold.values():
            last = variant is list(by_threshold.values())[-1]
            variants += _odd(variant, wide=last)
    return variants


def _odd(variant: Variant, *, wide: bool) -> Iterator[Variant]:
    given = variant.arguments
    sixty_four = {"TILE": given["TILE"]._replace(index=tl.int64)} if "TILE" in given else {}
    for label, replacement, constants in (
        ("all 1", 1, {}),
        ("unaligned", "i32", {}),
        ("64 bits", "i64", sixty_four),
    ):
        if label != "64 bits" or wide:
            yield dataclasses.replace(
                variant,
                name=f"{variant.name}, {label}",
                arguments={k: _with_integers(v, replacement, k) for k, v in given.items()}
                | constants,
            )


def _with_integers(argument: object, replacement: object, name: str) -> object:
    """Other than those that are compiled in; what is no integer gets unaligned."""
    if isinstance(argument, tuple) and name.islower():
        names = getattr(argument, "_fields", [name] * len(argument))
        others = map(_with_integers, argument, [replacement] * len(argument), names)
        return argument._make(others) if hasattr(argument, "_make") else tuple(others)
    if not isinstance(argument, str):
        return argument
    if argument.startswith("*"):
        return argument.partition(":")[0]
    if name in WHOLE_BLOCKS:
        return f"{replacement}:16" if replacement == "i64" else "i32:16"
    return argument if replacement == "i32" and argument == "i64" else replacement


if __name__ == "__main__":
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache)
        for variant in odd_variants():
            try:
                build(variant, 90)
            except Exception as error:
                failures += 1
                print(f"{variant.name}: {type(error).__name__}: {error}")
    print(f"{failures} of {len(odd_variants())} failed")
    sys.exit(failures > 0)
