"""The passes over the weight alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import triton.language as tl

from dst_kernels.backends.triton.masking import ELEMENT, SURROGATE_CODES, Rule
from dst_kernels.backends.triton.pack import apply_guard_kernel, pack_kernel
from dst_kernels.backends.triton.post import Slabs, post_kernel
from dst_kernels.backends.triton.tiles import StreamTile, pack_tile, post_tile, stream_candidates

from .base import (
    AUTOCAST,
    FLOAT32,
    PARTIAL_SUMS,
    SIXTEEN_BIT,
    Variant,
    granularities,
    matrix,
    pointer,
)

__all__ = ["streams"]


def streams() -> Iterator[Variant]:
    """pack, its second launch, and post, for long rows and short ones."""
    long, short = ((pack_tile(columns, 1), post_tile(columns, 1)) for columns in (4096, 256))
    for found in (*_passes(*long), *_passes(*short, every_dtype=False)):
        ampere = found.name.startswith(("pack fp32->bf16", "apply_guard fp32->bf16", "post bf16,"))
        yield found if ampere else dataclasses.replace(found, architectures=(90,))
    # What only tuning can choose, as it is used most: under autocast, with a threshold a row.
    tuned = [
        *(("pack fp32->bf16 row", tile, long[1]) for tile in stream_candidates(long[0])),
        *(("post bf16,fp32 row", long[0], tile) for tile in stream_candidates(long[1])),
    ]
    for name, *tiles in tuned:
        for found in _passes(*tiles):
            if found.name.startswith(name):
                yield dataclasses.replace(found, architectures=(90,))


def _passes(
    tile: StreamTile, of_post: StreamTile, *, every_dtype: bool = True
) -> Iterator[Variant]:
    """In these tiles; else without float16, whose code is bf16's."""
    for weight, packed in (*AUTOCAST, *SIXTEEN_BIT, *FLOAT32):
        for granularity, (axis, threshold) in granularities(False).items():
            if granularity != "row" and (weight, packed) != ("fp32", "bf16"):
                continue
            if packed == "fp16" and not every_dtype:
                continue
            for write in (True, False):
                if not write and packed != weight:
                    continue
                arguments = {
                    **_common(tile),
                    "weight": matrix(weight),
                    "packed": matrix(packed) if write else None,
                    "effective": threshold,
                    "pruned_counts": pointer("i32"),
                    "THRESHOLD": axis,
                }
                purpose = f"{weight}->{packed}" if write else weight
                name = f"{purpose} {granularity} {tile}"
                yield Variant(
                    f"{'pack' if write else 'count'} {name}",
                    pack_kernel,
                    {**arguments, "threshold": threshold, "chunk": "i32:16"},
                    tile.warps,
                    tile.stages,
                    wide_accesses=True,
                )
                if packed == "fp16" or not every_dtype:
                    continue  # it writes only where a layer has collapsed
                yield Variant(
                    f"apply_guard {name}",
                    apply_guard_kernel,
                    {
                        **arguments,
                        "stored": threshold if write else None,  # of a forward in training
                        "number_of_counts": "i32",
                        "least_pruned": "i64",
                    },
                    tile.warps,
                    tile.stages,
                )
            yield Variant(
                f"post {packed},{weight} {granularity} {of_post}",
                post_kernel,
                {
                    **_common(of_post),
                    # Slabs are float32; what comes in the activations' dtype is G itself.
                    "dense": Slabs(*matrix(packed), "i32" if packed == "fp32" else None, "i32:16"),
                    "weight": matrix(weight),
                    "threshold": threshold,
                    "grad_weight": matrix(weight),
                    "grad_threshold": threshold if axis == ELEMENT.value else PARTIAL_SUMS,
                    "chunk": "i32:16",
                    "RULE": Rule(axis, SURROGATE_CODES["long_tailed"], True),
                },
                of_post.warps,
                of_post.stages,
                wide_accesses=True,
            )


def _common(tile: StreamTile) -> dict[str, object]:
    sizes = {"R": "i32:16", "C": "i32:16"}
    return {**sizes, "COMPUTE": tl.float32, "ROWS": tile.rows, "BLOCK": tile.block}
