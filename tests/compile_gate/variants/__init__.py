"""Every kernel in every tile that the launchers' defaults can choose, for the gate.

Sizes and addresses are taken as multiples of 16, as in layers worth a GPU: odd ones compile to
slower code of the same kernels. For Hopper (90) all tiles are compiled; what only makes a kernel
smaller, or hardly another one, in the largest alone. For Ampere (80) each kernel is compiled in
its largest tiles, for float32 weights under autocast and in TF32.
"""

from __future__ import annotations

import dataclasses

from .base import Variant
from .conv import convolutions
from .linear import linear
from .streams import streams

__all__ = ["Variant", "shipped"]


def shipped() -> list[Variant]:
    """All of them, by unique names."""
    variants = {variant.name: variant for variant in streams()}
    for architecture in (90, 80):
        for variant in (*linear(architecture), *convolutions(architecture)):
            known = variants.get(variant.name)
            architectures = (*(known.architectures if known else ()), architecture)
            variants[variant.name] = dataclasses.replace(variant, architectures=architectures)
    return list(variants.values())
