"""Compiles, and only compiles, every kernel for arguments that the gate does not judge.

Triton compiles an integer argument anew where it is 1, not a multiple of 16, or too large for 32
bits. The interpreter does not, so what breaks there breaks first on a GPU.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile

import triton.language as tl

from .binary import build, prepare
from .variants import Variant, shipped


def odd_variants() -> list[Variant]:
    """One variant of each kernel and purpose: all integers 1, none aligned, all of 64 bits."""
    variants, seen = [], set()
    for variant in shipped():
        purpose = (
            variant.kernel.__name__,
            *sorted(
                (name, str(value))
                for name, value in variant.constexprs.items()
                if name in ("TRANSPOSED", "COUNT", "GUARD", "SPLIT", "THRESHOLD", "WRITE", "PIECES")
            ),
        )
        if purpose in seen or 90 not in variant.architectures:
            continue
        seen.add(purpose)
        integers = [name for name, kind in variant.signature.items() if not kind.startswith("*")]
        pointers = {name: kind for name, kind in variant.signature.items() if name not in integers}
        constants = dict(variant.constexprs)
        wide = {"INDEX": tl.int64} if "INDEX" in constants else {}
        for label, signature, constexprs in (
            ("all 1", pointers, constants | dict.fromkeys(integers, 1)),
            ("unaligned", variant.signature, constants),
            ("64 bits", variant.signature | dict.fromkeys(integers, "i64"), constants | wide),
        ):
            variants.append(
                dataclasses.replace(
                    variant,
                    name=f"{variant.name}, {label}",
                    signature=signature,
                    constexprs=constexprs,
                    aligned=(),
                )
            )
    return variants


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
