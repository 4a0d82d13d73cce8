"""Compiles, and only compiles, every kernel for arguments that the gate does not judge.

Triton compiles an integer argument anew where it is 1, not a multiple of 16, or too large for 32
bits. The interpreter does not, so what breaks there breaks first on a GPU.

What launchers round up to whole blocks is never 1, and is not made 1 here, nor is what they keep
from being specialised.
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
WHOLE_BLOCKS = ("chunk",)
# By `do_not_specialize`, or as they are `odd`.
NOT_SPECIALISED = ("M", "steps", "parts", "number_of_counts", "number")
NOT_SPECIALISED += ("in_h", "in_w", "out_h", "out_w")


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
    if name in NOT_SPECIALISED and replacement == 1:
        return "i32"
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
