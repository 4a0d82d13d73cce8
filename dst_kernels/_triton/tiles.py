"""Tile configurations and the default choice among them.

Sizes are those that compile for Hopper without spills and with overlapping tensor-core work; the
gate in `python -m dst_kernels.aot` holds every one to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "GradWeightTile",
    "ProductTile",
    "StreamTile",
    "grad_weight_tile",
    "product_tile",
    "stream_tile",
]

# A Hopper GPU has 132 multiprocessors. Smaller GPUs get more programs than they need.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class ProductTile:
    """Of a masked product: `block_m` tokens, `block_r` outputs, `block_c` summed at a time.

    `split` programs share the sum of one tile; `group` outer tiles run together to share L2.
    """

    block_m: int
    block_r: int
    block_c: int
    warps: int
    stages: int
    split: int = 1
    group: int = 8


@dataclass(frozen=True)
class GradWeightTile:
    """Of the weight's gradient: `block_r` x `block_c` weights, `block_m` tokens at a time.

    `pieces` of the tile go through the epilogue one after the other; `split` as above.
    """

    block_r: int
    block_c: int
    block_m: int
    warps: int
    stages: int
    pieces: int = 1
    split: int = 1
    group: int = 8


@dataclass(frozen=True)
class StreamTile:
    """Of a pass over the weight: `rows` x `block` at a time."""

    rows: int
    block: int
    warps: int

    def chunk(self, row_blocks: int, columns: int) -> tuple[int, int]:
        """(columns for each program, programs side by side) so that all fill the GPU."""
        wanted = -(-4 * MULTIPROCESSORS // row_blocks)
        blocks = -(-columns // self.block)
        chunk = -(-blocks // min(wanted, blocks)) * self.block
        return chunk, -(-columns // chunk)


def _power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two from `size` upwards, within bounds."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def stream_tile(columns: int, column_stride: int) -> StreamTile:
    """4096 weights at a time, 16 for each thread, along whichever axis is contiguous."""
    if column_stride != 1:  # a transposed weight: its rows lie next to each other
        return StreamTile(rows=128, block=32, warps=8)
    block = _power_of_two(columns, 32, 4096)
    return StreamTile(rows=4096 // block, block=block, warps=8)


def product_tile(M: int, R: int, C: int, dtype: torch.dtype, tf32: bool) -> ProductTile:
    """For M tokens, R outputs and a sum over C in `dtype`."""
    if dtype == torch.float32:
        if not tf32:
            return ProductTile(_power_of_two(M, 16, 64), 64, 32, 4, 2)
        return ProductTile(_power_of_two(M, 16, 128), 128, 32, 8, 3)
    block_m = _power_of_two(M, 16, 128)
    tile = ProductTile(block_m, 128, 64, 4 if block_m <= 32 else 8, 4 if block_m <= 32 else 3)
    tiles = -(-R // tile.block_r) * -(-M // block_m)
    # Too few tiles: share each sum, but leave every program a few steps of it.
    split = min(MULTIPROCESSORS // tiles, C // (4 * tile.block_c), 16) if tiles else 1
    if split < 2:
        return tile
    return ProductTile(
        tile.block_m, tile.block_r, tile.block_c, tile.warps, tile.stages, split=split
    )


def grad_weight_tile(M: int, R: int, C: int, dtype: torch.dtype, tf32: bool) -> GradWeightTile:
    """For a weight [R, C] and M tokens in `dtype`."""
    if dtype == torch.float32:
        return GradWeightTile(64, 64, 32, 4, 3 if tf32 else 2)
    tile = GradWeightTile(128, 128, 64, 8, 3)
    tiles = -(-R // tile.block_r) * -(-C // tile.block_c)
    split = min(MULTIPROCESSORS // tiles, M // (8 * tile.block_m), 8) if tiles else 1
    if split >= 2:
        return GradWeightTile(128, 128, 64, 8, 3, split=split)
    if tiles >= 4 * MULTIPROCESSORS:
        return GradWeightTile(128, 256, 64, 8, 4, pieces=2)
    return tile
