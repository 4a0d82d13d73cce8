"""The passes over the weight alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import triton.language as tl

from dst_kernels.backends.triton.masking import ELEMENT
from dst_kernels.backends.triton.pack import apply_guard_kernel, pack_kernel
from dst_kernels.backends.triton.post import post_kernel
from dst_kernels.backends.triton.tiles import StreamTile, pack_tile, post_tile, stream_candidates

from .base import AUTOCAST, FLOAT32, SIXTEEN_BIT, Variant, granularities, unit_strides, variant

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
        for granularity, (axis, unit) in granularities(False).items():
            if granularity != "row" and (weight, packed) != ("fp32", "bf16"):
                continue
            if packed == "fp16" and not every_dtype:
                continue
            element = axis == ELEMENT.value
            for write in (True, False):
                if not write and packed != weight:
                    continue
                constants = {
                    **_blocks(tile),
                    **unit_strides("wc", "pc", *(["ec"] if element else ["er"] if axis else [])),
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
                yield variant(
                    f"{'pack' if write else 'count'} {name}",
                    pack_kernel,
                    {**pointers, "threshold": "fp32"},
                    {**constants, **unit},
                    warps=tile.warps,
                    stages=tile.stages,
                    wide_accesses=True,
                )
                if packed == "fp16" or not every_dtype:
                    continue  # it writes only where a layer has collapsed
                yield variant(
                    f"apply_guard {name}",
                    apply_guard_kernel,
                    pointers,
                    {**constants, "COUNTS": 1024},
                    warps=tile.warps,
                    stages=tile.stages,
                )
            yield variant(
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
                    **unit_strides("dc", "wc", "gc", *(["hc"] if element else [])),
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
