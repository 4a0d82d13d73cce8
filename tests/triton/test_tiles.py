"""Many tiles, tails in every dimension, split sums, epilogues in pieces: at small sizes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from triton_cases import check, crossed, gradient_along, normal, run, same, thresholds

from dst_kernels import reference
from dst_kernels.backends.triton import linear, pack, tiles
from dst_kernels.backends.triton import weight as weight_ops
from dst_kernels.backends.triton.tiles import (
    GradWeightTile,
    ProductTile,
    StreamTile,
    Traits,
    grad_weight_tile,
    pack_tile,
    post_tile,
    product_tile,
)

pytestmark = pytest.mark.usefixtures("poisoned")

F16, F32 = torch.float16, torch.float32
# input, weight, granularity
KINDS = {
    "float32": (F32, F32, "layer"),
    "autocast": (F16, F32, "row"),
    "float16": (F16, F16, "element"),
}


def in_tiles(cases):
    """Each in one of the kinds, the slow tests in all."""
    named = {f"{tile!r}-{shape}": (tile, shape) for tile, shape in cases}
    return crossed(("tile", "shape", "of_input", "dtype", "granularity"), named, KINDS)


def product(m, r, c, **options):
    return ProductTile(block_m=m, block_r=r, block_c=c, warps=4, stages=2, **options)


def gradient(r, c, m, **options):
    return GradWeightTile(block_r=r, block_c=c, block_m=m, warps=4, stages=2, **options)


PRODUCTS = [
    (product(16, 16, 16), (17, 37, 20)),
    (product(16, 32, 16, split=3), (20, 40, 70)),  # parts of two steps, the last of one
    (product(32, 16, 32, split=16), (33, 20, 65)),  # more parts than steps
    (product(16, 16, 64, split=2, group=1), (20, 40, 64)),  # one step for two parts
    (product(16, 16, 16, group=3), (20, 70, 5)),  # bands of three tiles, the last of two
    (product(64, 16, 16, split=5, group=2), (1, 40, 81)),
    (product(16, 16, 16, unroll=2), (20, 20, 70)),
]
GRADIENTS = [
    (gradient(16, 16, 16), (20, 37, 33)),
    (gradient(16, 32, 16, pieces=2), (20, 37, 50)),
    (gradient(32, 64, 16, pieces=2, group=1), (5, 40, 20)),  # a second piece without a column
    (gradient(16, 64, 16, pieces=4), (20, 20, 100)),
    (gradient(16, 16, 16, group=3), (5, 70, 20)),
    (gradient(16, 32, 16, split=3), (70, 20, 40)),
    (gradient(32, 16, 32, split=16), (65, 40, 20)),
    (gradient(16, 16, 64, split=2), (64, 20, 17)),
]


@in_tiles(PRODUCTS)
def test_products(tile, shape, of_input, dtype, granularity, device, monkeypatch):
    """Also where a program of the second launch takes several tiles."""
    monkeypatch.setattr(linear, "product_tile", lambda *_, **__: tile)
    monkeypatch.setattr("dst_kernels.backends.triton.product.MULTIPROCESSORS", 2)
    M, N, K = shape
    weight = normal(N, K, dtype=dtype, device=device)
    threshold = thresholds((N, K), granularity, device=device)
    input, bias = normal(M, K, dtype=of_input, device=device), normal(N, device=device)
    kept = reference.threshold_mask(weight, threshold).sum().item()
    for counted, expected in ((kept - 1, threshold), (kept, torch.zeros_like(threshold))):
        ratio = counted / weight.numel()
        _, effective = check("masked_linear", input, weight, threshold, bias, ratio)
        same((effective,), expected)
    check("masked_linear", input, weight, threshold, None, None)
    grad = normal(M, K, dtype=of_input, device=device)
    transposed = threshold.t() if granularity == "element" else threshold[:1].expand(K)
    check("masked_linear_grad_input", grad, weight.t(), transposed)


@in_tiles(GRADIENTS)
def test_weight_gradients(tile, shape, of_input, dtype, granularity, device, monkeypatch):
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_, **__: tile)
    M, N, K = shape
    weight = normal(N, K, dtype=dtype, device=device)
    threshold = thresholds((N, K), granularity, device=device)
    input = normal(M, K, dtype=of_input, device=device)
    grad = (input.double() @ weight.double().t() / K**0.5).to(of_input)
    for surrogate, structure_gradient in (("long_tailed", True), ("triangular", False)):
        check(
            "masked_linear_grad_weight",
            *(grad, input, weight, threshold, surrogate, structure_gradient),
        )


STREAMS = [
    (StreamTile(1, 32, 4), (5, 70)),
    (StreamTile(4, 32, 4), (17, 65)),
    (StreamTile(16, 64, 4), (33, 130)),
    (StreamTile(32, 32, 4), (3, 5)),
]


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
@pytest.mark.parametrize(("tile", "shape"), STREAMS, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_pack_and_post(tile, shape, granularity, multiprocessors, device, monkeypatch, fresh_plans):
    """With one chunk of several blocks for each row block, and with several chunks."""
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(pack, "pack_tile", lambda *_: tile)
    monkeypatch.setattr(weight_ops, "post_tile", lambda *_: tile)
    weight, threshold = normal(*shape, device=device), thresholds(shape, granularity, device=device)
    for ratio in (None, 0.0, 1.0):
        same(
            run("masked_weight", weight, threshold, ratio, F16),
            reference.masked_weight(weight, threshold, ratio, F16),
        )
    grad = gradient_along(weight)
    check("masked_weight_backward", grad, weight, threshold, "long_tailed", True)


SIZES = (1, 3, 16, 17, 100, 128, 1000, 4096, 16384)


TRAITS = [
    Traits(dtype, tf32, hopper)
    for dtype, tf32 in ((F32, False), (F32, True), (F16, False))
    for hopper in (True, False)
]


def product_choices():
    """((M, R, C), traits, the tile) for many sizes."""
    for traits, element_wise in itertools.product(TRAITS, (True, False)):
        for sizes in itertools.product((*SIZES, 65536), SIZES, SIZES):
            yield sizes, traits, product_tile(*sizes, traits, element_wise)


def gradient_choices():
    for traits, element_wise in itertools.product(TRAITS, (True, False)):
        for sizes in itertools.product((*SIZES, 65536), SIZES, SIZES):
            yield sizes, traits, grad_weight_tile(*sizes, traits, element_wise)


def every_tile(choices):
    """With and, where that is chosen, without a sum shared by several programs."""
    found = {}  # a set, in order
    for _, traits, tile in choices():
        found[dataclasses.replace(tile, split=min(tile.split, 2)), traits.dtype, traits.tf32] = True
    return pytest.mark.parametrize(
        ("tile", "dtype", "tf32"),
        [
            pytest.param(*one, id=" ".join(map(repr, one)), marks=[pytest.mark.gpu] * one[2])
            for one in found
        ],
    )


@every_tile(product_choices)
def test_products_in_every_tile_that_is_chosen(
    tile, dtype, tf32, device, monkeypatch, float32_products
):
    monkeypatch.setattr(linear, "product_tile", lambda *_, **__: tile)
    if tf32:
        float32_products(torch.backends.cuda.matmul, "tf32")
    M, N = tile.block_m + 3, tile.block_r + 5
    K = tile.block_c * tile.unroll * (tile.split + 1) + 7
    weight, threshold = normal(N, K, device=device), thresholds((N, K), "row", device=device)
    input, grad = normal(M, K, dtype=dtype, device=device), normal(M, N, dtype=dtype, device=device)
    check("masked_linear", input, weight, threshold, normal(N, device=device), 0.01)
    check("masked_linear_grad_input", grad, weight, threshold)


@every_tile(gradient_choices)
def test_weight_gradients_in_every_tile_that_is_chosen(
    tile, dtype, tf32, device, monkeypatch, float32_products
):
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_, **__: tile)
    if tf32:
        float32_products(torch.backends.cuda.matmul, "tf32")
    M, N, K = tile.block_m * (tile.split + 1) + 7, tile.block_r + 5, tile.block_c + 3
    weight, threshold = normal(N, K, device=device), thresholds((N, K), "row", device=device)
    input = normal(M, K, dtype=dtype, device=device)
    grad = (input.double() @ weight.double().t() / K**0.5).to(dtype)
    check("masked_linear_grad_weight", grad, input, weight, threshold, "long_tailed", True)


def test_chunks_cover_all_columns_once():
    for columns, rows, column_stride in itertools.product((*SIZES, 2**20), (*SIZES, 2**20), (1, 7)):
        for choose in (pack_tile, post_tile):
            tile = choose(columns, column_stride)
            chunk, chunks = tile.chunk(-(-rows // tile.rows), columns)
            assert chunk % tile.block == 0
            assert chunk * (chunks - 1) < columns <= chunk * chunks


def test_the_largest_tiles_are_for_many_tokens():
    traits = Traits(F16, False, True)
    for M, tokens, columns in ((16, 16, 128), (512, 128, 128), (513, 256, 256), (4096, 256, 256)):
        assert product_tile(M, 4096, 4096, traits, False).block_m == tokens
        assert grad_weight_tile(M, 4096, 4096, traits, False).block_c == columns
    assert product_tile(4096, 4096, 4096, traits, True).block_m == 128
    assert product_tile(4096, 4096, 4096, Traits(F32, True, True), False).block_m == 128


def test_splits_leave_every_program_some_work():
    for (_, _, C), _, tile in product_choices():
        assert 1 <= tile.split <= max(1, C // tile.block_c)
    for (M, _, _), _, tile in gradient_choices():
        assert 1 <= tile.split <= max(1, M // tile.block_m)


def test_only_float32_products_are_compiled_for_tf32(float32_products):
    """In 16 bits the setting changes nothing, and must not make another binary."""
    float32_products(torch.backends.cuda.matmul, "tf32")
    for dtype in (F16, torch.bfloat16, F32):
        assert linear.traits_of(torch.empty(0, dtype=dtype)).tf32 == (dtype is F32)
