"""Define tile configurations and the default choice among them.

All compile for Hopper without spilled registers and with overlapping tensor-core work;
`python -m tests.compile_gate` checks each of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# A Hopper GPU has 132 multiprocessors. Smaller GPUs get more programs than they need.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Traits:
    """Hold what a product depends on: the activations' dtype, TF32 for float32, the GPU."""

    dtype: torch.dtype
    tf32: bool
    hopper: bool

    @property
    def tensor_cores(self) -> bool:
        return self.dtype != torch.float32 or self.tf32

    @property
    def precision(self) -> str:
        """Return Triton's input_precision; it has no effect on 16-bit products."""
        return "tf32" if self.tf32 else "ieee"


@dataclass(frozen=True)
class ProductTile:
    """Size a masked product: `block_m` tokens, `block_r` outputs, `block_c` summed at a time.

    `unroll` steps of the sum are one iteration (with one alone, ptxas may run the tensor cores one
    instruction at a time). `split` programs share the sum of one tile; `group` outer tiles run
    together to share L2.
    """

    block_m: int
    block_r: int
    block_c: int
    warps: int
    stages: int
    unroll: int = 1
    split: int = 1
    group: int = 8

    def __str__(self) -> str:
        blocks = f"{self.block_m}x{self.block_r}x{self.block_c}"
        return f"{blocks} w{self.warps} s{self.stages} u{self.unroll}"


@dataclass(frozen=True)
class GradWeightTile:
    """Size the weight's gradient: `block_r` x `block_c` weights, `block_m` tokens at a time.

    `pieces` of the tile go through the epilogue one after the other; `split` and `group` are as in
    `ProductTile`.
    """

    block_r: int
    block_c: int
    block_m: int
    warps: int
    stages: int
    pieces: int = 1
    split: int = 1
    group: int = 8

    def __str__(self) -> str:
        return f"{self.block_r}x{self.block_c}x{self.block_m} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class StreamTile:
    """Size a pass over the weight: `rows` x `block` weights at a time."""

    rows: int
    block: int
    warps: int = 8
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.block} w{self.warps}"

    def chunk(self, row_blocks: int, columns: int) -> tuple[int, int]:
        """Return (columns for each program, programs for each row block) that fill the GPU."""
        wanted = -(-4 * MULTIPROCESSORS // row_blocks)
        blocks = -(-columns // self.block)
        chunk = -(-blocks // min(wanted, blocks)) * self.block
        return chunk, -(-columns // chunk)


def _power_of_two(size: int, least: int, most: int) -> int:
    """Return the smallest power of two of at least `size`, within bounds."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


@functools.lru_cache(maxsize=4096)
def pack_tile(columns: int, column_stride: int) -> StreamTile:
    """Return tiles of 4096 weights, 16 for each thread, along the contiguous axis."""
    if column_stride != 1:  # a transposed weight: its rows lie next to each other
        return StreamTile(rows=128, block=32)
    block = _power_of_two(columns, 32, 4096)
    return StreamTile(rows=4096 // block, block=block)


@functools.lru_cache(maxsize=4096)
def post_tile(columns: int, column_stride: int) -> StreamTile:
    """Return tiles half that size: two tensors are read, and their arithmetic takes registers."""
    tile = pack_tile(columns, column_stride)
    if tile.rows > 1:
        return dataclasses.replace(tile, rows=tile.rows // 2)
    return dataclasses.replace(tile, block=tile.block // 2)


def stream_candidates(default: StreamTile) -> list[StreamTile]:
    """Return what tuning tries besides: other sizes, and other numbers of threads for a size."""
    rows, block, warps = default.rows, default.block, default.warps
    half = {"rows": rows // 2} if rows > 1 else {"block": block // 2}
    tiles = [
        dataclasses.replace(default, warps=warps // 2),
        dataclasses.replace(default, **half, warps=warps // 2),
        dataclasses.replace(default, **half),
        dataclasses.replace(default, rows=2 * rows),
        dataclasses.replace(default, rows=2 * rows, warps=2 * warps),
    ]
    # Each thread has at least one access of 16 bytes to tensors of 16 bits.
    return [tile for tile in tiles if tile.rows * tile.block >= 8 * 32 * tile.warps]


# Products on tensor cores, by the tokens of a tile. Hopper takes two steps of 32 in one iteration:
# with one step, or with 64, ptxas runs wgmma one instruction at a time in some variants. Ampere
# takes one step and has fewer shapes: others spill registers.
_HOPPER = {m: ProductTile(m, 128, 32, 8, 3, unroll=2) for m in (16, 32, 64, 128)}
_AMPERE = {m: ProductTile(m, 128, 32, 8, 3) for m in (16, 64)}
# For many tokens, 16-bit products on Hopper, and thresholds that are not element-wise; not split.
# Each masked weight is multiplied with twice as many tokens.
_MANY_TOKENS = ProductTile(256, 128, 32, 8, 3, unroll=2)
# Exact float32 runs on the ordinary cores.
_FLOAT32 = {m: ProductTile(m, 64, 16, 4, 2) for m in (16, 32)}

# More tiles that tuning may try for 16-bit products on Hopper. With a threshold for each row all
# compile without spills, for float32 and 16-bit weights. Those in _MORE may be split; those in
# _MORE_WHOLE may not: split, they spill or wait for each wgmma. With a threshold for each weight
# the largest spill, or do not fit in shared memory, and tuning skips them. One step in an iteration
# is left out: with Triton 3.6 registers are then written while wgmma reads them.
_MORE = (
    ProductTile(16, 128, 32, 8, 4, unroll=2),
    ProductTile(16, 64, 64, 4, 4, unroll=2),
    ProductTile(128, 128, 32, 8, 4, unroll=2),
)
_MORE_WHOLE = (
    _MANY_TOKENS,
    ProductTile(64, 64, 32, 4, 4, unroll=2),
)

_SMALL, _MIDDLE, _LARGE = (
    GradWeightTile(64, 64, 64, 4, 4, pieces=2),
    GradWeightTile(128, 128, 64, 8, 3, pieces=4),
    GradWeightTile(128, 256, 64, 8, 3, pieces=4),
)
# More for the weight's gradient; not split. (64x128 and four stages of 128x256 spill, or wait for
# each wgmma, with Triton 3.6.)
_MORE_GRAD_WEIGHT = (
    GradWeightTile(128, 128, 64, 8, 4, pieces=4),
    GradWeightTile(128, 128, 128, 8, 2, pieces=4),
)
_SMALL_TF32 = GradWeightTile(64, 64, 32, 4, 3)
_MIDDLE_TF32 = GradWeightTile(128, 128, 32, 8, 3, pieces=4)
_GRAD_FLOAT32 = GradWeightTile(64, 64, 16, 4, 2)


@functools.lru_cache(maxsize=4096)
def product_tile(M: int, R: int, C: int, traits: Traits, element_wise: bool) -> ProductTile:
    """Return the default tile for M tokens, R outputs and a sum over C."""
    tile = _least_covering(M, tuple(_product_tiles(traits).values()))
    programs = -(-R // tile.block_r) * -(-M // tile.block_m)
    if tile.block_m == 128 and _takes_more(traits) and not element_wise:
        # Shared memory limits both: for 64 columns of the sum it takes 896 clocks for 128 tokens,
        # 1280 for 256 (the weight is written and read once; activations twice, by each warp group).
        twice = -(-R // _MANY_TOKENS.block_r) * -(-M // _MANY_TOKENS.block_m)
        if 1280 * -(-twice // MULTIPROCESSORS) < 896 * -(-programs // MULTIPROCESSORS):
            return _MANY_TOKENS
    # If tiles are too few to fill the GPU, programs share each sum, with a few steps for each.
    steps = C // (4 * tile.block_c * tile.unroll)
    return _split(tile, programs, steps, most=16)


def conv_product_tile(M: int, traits: Traits) -> ProductTile:
    """Return the default tile for M positions of a convolution."""
    return _least_covering(M, conv_product_tiles(traits))


def conv_product_tiles(traits: Traits) -> tuple[ProductTile, ...]:
    """Return all tiles that may be chosen, smallest first."""
    tiles = tuple(_product_tiles(traits).values())
    if traits.hopper or traits.dtype != torch.float32:
        return tiles
    # With three stages TF32 spills, as the addresses of positions also take registers.
    return tuple(dataclasses.replace(tile, stages=2) for tile in tiles)


def _least_covering(M: int, tiles: Sequence[ProductTile]) -> ProductTile:
    """Return the first tile with `block_m` of M or more, else the last."""
    return next((tile for tile in tiles if tile.block_m >= M), tiles[-1])


def product_candidates(default: ProductTile, traits: Traits) -> list[ProductTile]:
    """Return the tiles that tuning tries."""
    splits = {1, max(default.split // 2, 1), default.split, 2 * default.split}
    more, whole = (_MORE, _MORE_WHOLE) if _takes_more(traits) else ((), ())
    tiles = (*_product_tiles(traits).values(), *more)
    return [
        *(dataclasses.replace(tile, split=split) for tile in tiles for split in sorted(splits)),
        *whole,
    ]


def _takes_more(traits: Traits) -> bool:
    return traits.hopper and traits.dtype != torch.float32


def _product_tiles(traits: Traits) -> dict[int, ProductTile]:
    if not traits.tensor_cores:
        return _FLOAT32
    return _HOPPER if traits.hopper else _AMPERE


@functools.lru_cache(maxsize=4096)
def grad_weight_tile(M: int, R: int, C: int, traits: Traits, element_wise: bool) -> GradWeightTile:
    """Return the default tile for a weight [R, C] and M tokens."""
    small, *larger = _grad_weight_tiles(traits, element_wise)
    middle, *large = larger or (small,)
    programs = -(-R // middle.block_r) * -(-C // middle.block_c)
    if 2 * programs < MULTIPROCESSORS and M // middle.block_m < 8:
        return small  # too few weights and tokens for larger tiles
    if large and programs >= 4 * MULTIPROCESSORS and M > 512:
        return large[0]  # with few tokens its epilogue is most of the work: two middle ones overlap
    # A split sum is also more accurate: each part is a shorter chain of additions.
    return _split(middle, programs, M // (8 * middle.block_m), most=8)


def grad_weight_candidates(
    default: GradWeightTile, traits: Traits, element_wise: bool
) -> list[GradWeightTile]:
    """Return the tiles that tuning tries."""
    tiles = _grad_weight_tiles(traits, element_wise)
    whole = [dataclasses.replace(tile, split=1) for tile in tiles]
    if len(tiles) == 1:
        return whole
    if _takes_more(traits):
        whole += _MORE_GRAD_WEIGHT
    splits = {max(default.split // 2, 2), max(default.split, 2), 2 * default.split}
    return whole + [dataclasses.replace(tiles[1], split=split) for split in sorted(splits)]


def conv_grad_weight_tile(M: int, R: int, C: int, taps: int, traits: Traits) -> GradWeightTile:
    """Return the default tile for M positions and a weight of `taps` matrices [R, C]."""
    tile, *middle = conv_grad_weight_tiles(traits)
    # A tile that is mostly padding does more work than a small one.
    if middle and middle[0].block_r < 2 * R and middle[0].block_c < 2 * C:
        tile = middle[0]
    programs = -(-R // tile.block_r) * -(-C // tile.block_c) * taps
    # Two rounds of programs: there are many positions, so slabs are small compared with the images.
    return _split(tile, programs, M // (8 * tile.block_m), most=64, wanted=2 * MULTIPROCESSORS)


def conv_grad_weight_candidates(default: GradWeightTile, traits: Traits) -> list[GradWeightTile]:
    """Return the tiles that tuning tries."""
    splits = sorted({1, max(default.split // 2, 1), default.split, 2 * default.split})
    tiles = conv_grad_weight_tiles(traits)
    return [dataclasses.replace(tile, split=split) for tile in tiles for split in splits]


def conv_grad_weight_tiles(traits: Traits) -> tuple[GradWeightTile, ...]:
    """Return the tiles for convolutions; the large one spills: addresses take registers."""
    return _grad_weight_tiles(traits, element_wise=True)


def _grad_weight_tiles(traits: Traits, element_wise: bool) -> tuple[GradWeightTile, ...]:
    """Return the small, the middle and the large tile, without those that spill or do not pay."""
    if not traits.tensor_cores:
        return (_GRAD_FLOAT32,)
    if traits.dtype == torch.float32:
        return (_SMALL_TF32, _MIDDLE_TF32)
    return (_SMALL, _MIDDLE, _LARGE) if traits.hopper and not element_wise else (_SMALL, _MIDDLE)


def _split(tile, programs: int, steps: int, most: int, wanted: int = MULTIPROCESSORS):
    split = min(wanted // programs, steps, most)
    return dataclasses.replace(tile, split=split) if split > 1 else tile


# What the choices above can return, by compute capability, for the compile gate. All products may
# be split; of the weight's gradient only the middle tile, or the only one.
PRODUCT_TILES = {90: tuple(_HOPPER.values()), 80: tuple(_AMPERE.values())}
FLOAT32_PRODUCT_TILES = tuple(_FLOAT32.values())
GRAD_WEIGHT_TILES = {90: (_SMALL, _MIDDLE, _LARGE), 80: (_SMALL, _MIDDLE)}
TF32_GRAD_WEIGHT_TILES = (_SMALL_TF32, _MIDDLE_TF32)
FLOAT32_GRAD_WEIGHT_TILES = (_GRAD_FLOAT32,)
SLAB_TILE, TF32_SLAB_TILE = _MIDDLE, _MIDDLE_TF32
MANY_TOKENS_TILE = _MANY_TOKENS
# What tuning can also choose, on Hopper.
MORE_PRODUCT_TILES = (*_MORE, *_MORE_WHOLE)
MORE_GRAD_WEIGHT_TILES = _MORE_GRAD_WEIGHT
