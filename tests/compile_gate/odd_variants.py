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

PURPOSE = ("TRANSPOSED", "COUNT", "GUARD", "SPLIT", "WRITE", "PIECES")
WHOLE_BLOCKS = ("part", "chunk")


def odd_variants() -> list[Variant]:
    """Variants of each kernel and purpose: all integers 1, none aligned, all of 64 bits.

    The last only with the thresholds that take the most arithmetic, which are the last ones.
    """
    found: dict[tuple, dict[str, Variant]] = {}
    for variant in shipped():
        if 90 in variant.architectures:
            values = variant.constexprs
            purpose = variant.kernel.__name__, *(str(values.get(name)) for name in PURPOSE)
            found.setdefault(purpose, {}).setdefault(str(values.get("THRESHOLD")), variant)
    variants = []
    for by_threshold in found.values():
        for variant in by_threshold.values():
            last = variant is list(by_threshold.values())[-1]
            variants += _odd(variant, wide=last)
    return variants


def _odd(variant: Variant, *, wide: bool) -> Iterator[Variant]:
    integers = [name for name, kind in variant.signature.items() if not kind.startswith("*")]
    ones = [name for name in integers if name not in WHOLE_BLOCKS]
    others = {name: kind for name, kind in variant.signature.items() if name not in ones}
    constants = dict(variant.constexprs)
    index = {"INDEX": tl.int64} if "INDEX" in constants else {}
    for label, signature, constexprs in (
        ("all 1", others, constants | dict.fromkeys(ones, 1)),
        ("unaligned", variant.signature, constants),
        ("64 bits", variant.signature | dict.fromkeys(integers, "i64"), constants | index),
    ):
        if label != "64 bits" or wide:
            yield dataclasses.replace(
                variant,
                name=f"{variant.name}, {label}",
                signature=signature,
                constexprs=constexprs,
                aligned=tuple(name for name in WHOLE_BLOCKS if name in signature),
            )


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
