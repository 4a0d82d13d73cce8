"""Each real tile, again and again while copies run on another stream: the same bits every time.

A race between the copies into shared memory and the tensor cores that read them shows in one call
of many, and only where the sum is long enough for the pipeline to be full.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_cases import check, normal, thresholds

from dst_kernels import ops
from dst_kernels.backends.triton import conv, linear, tiles

pytestmark = pytest.mark.usefixtures("poisoned")

GPU = torch.cuda.is_available()
REPEATS = 500 if GPU else 2
LONG = 4096
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# input, weight: of 16 bits (without a GPU float16, as the interpreter's bfloat16 is wrong) and TF32
KINDS = pytest.mark.parametrize(
    ("of_input", "dtype"),
    [
        (BF16 if GPU else F16, F32),
        pytest.param(BF16, BF16, marks=pytest.mark.gpu),
        pytest.param(F32, F32, marks=pytest.mark.gpu),
    ],
    ids=["mixed", "16 bits", "tf32"],
)


def _tiles(chosen, tuned, split):
    """Those that are chosen, the first also with a shared sum; those of tuning take longer."""
    slow = pytest.mark.slow
    params = [*chosen, *([dataclasses.replace(chosen[0], split=split)] if split > 1 else [])]
    params += [pytest.param(tile, marks=slow) for tile in tuned]
    return pytest.mark.parametrize("tile", params, ids=lambda tile: f"{tile} split {tile.split}")


@pytest.fixture
def sizes(device):
    """Of tokens, outputs and inputs; without a GPU just over one tile, for two turns of a loop."""

    def choose(tokens: int, outputs: int, inputs: int) -> tuple[int, int, int]:
        return (LONG,) * 3 if GPU else (tokens + 3, outputs + 5, inputs + 7)

    return choose


@pytest.fixture
def rounding(of_input, float32_products):
    if of_input == F32:
        float32_products(torch.backends.cuda.matmul, "tf32")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def hammer(name: str, *args, repeats: int = REPEATS) -> None:
    """Call the op, which must be right, `repeats` times more, which must be the same bits.

    Nothing waits for the GPU in between, so that calls and copies overlap.
    """
    first = check(name, *args)
    differs = torch.zeros(repeats, dtype=torch.bool, device=first[0].device)
    copy = _copies(first[0].device)
    for index in range(repeats):
        copy()
        results = getattr(ops, name)(*args, "triton")
        results = results if isinstance(results, tuple) else (results,)
        for result, expected in zip(results, first, strict=True):
            differs[index] |= (_bits(result) != _bits(expected)).any()
    wrong = differs.nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} of {repeats} repetitions differ, the first: {wrong[:5]}"


def _copies(device: torch.device) -> Callable[[], object]:
    """Return what enqueues copies on a stream of their own, or does nothing."""
    if device.type != "cuda":
        return lambda: None
    source, stream = torch.ones(2**26, device=device), torch.cuda.Stream()
    target = torch.empty_like(source)
    torch.cuda.synchronize()

    def enqueue() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    return enqueue


@KINDS
@_tiles(tiles.PRODUCT_TILES[90], tiles.MORE_PRODUCT_TILES, 4)
def test_forward_and_input_gradient(tile, of_input, dtype, sizes, device, monkeypatch, rounding):
    if of_input == F32 and tile in tiles.MORE_PRODUCT_TILES:
        pytest.skip("tuning tries it for 16 bits only")
    monkeypatch.setattr(linear, "product_tile", lambda *_, **__: tile)
    M, N, K = sizes(tile.block_m, tile.block_r, tile.block_c * tile.unroll * tile.split)
    weight = normal(N, K, dtype=dtype, device=device)
    threshold = thresholds((N, K), "row", device=device)
    input = normal(M, K, dtype=of_input, device=device)
    hammer("masked_linear", input, weight, threshold, normal(N, device=device), 0.01)
    grad = normal(M, N, dtype=of_input, device=device)
    hammer("masked_linear_grad_input", grad, weight, threshold)


def _gradient_case(of_input, dtype, shape, device):
    M, N, K = shape
    weight = normal(N, K, dtype=dtype, device=device)
    input = normal(M, K, dtype=of_input, device=device)
    # Along the weight: thresholds' gradients would else be small differences of large numbers.
    grad = (input.double() @ weight.double().t() / K**0.5).to(of_input)
    return grad, input, weight, thresholds((N, K), "row", device=device), "long_tailed", True


@KINDS
@_tiles(tiles.GRAD_WEIGHT_TILES[90], tiles.MORE_GRAD_WEIGHT_TILES, 2)
def test_weight_gradient(tile, of_input, dtype, sizes, device, monkeypatch, rounding):
    if of_input == F32:
        tile = tiles.TF32_GRAD_WEIGHT_TILES[tile.block_r > 64]
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_, **__: tile)
    shape = sizes(tile.block_m * tile.split, tile.block_r, tile.block_c)
    hammer("masked_linear_grad_weight", *_gradient_case(of_input, dtype, shape, device))


@pytest.fixture
def conv_case(device):
    """The arguments of a convolution over images in channels last, for these tiles' sizes."""

    def make(positions: int, outputs: int, channels: int, of_input, dtype):
        side = 28 if GPU else math.isqrt(positions) + 1  # without a GPU just over one tile
        images, outputs, channels = (16, 512, 512) if GPU else (1, outputs + 5, channels + 3)
        weight = normal(outputs, channels, 3, 3, dtype=dtype, device=device)
        x = normal(images, channels, side, side, dtype=of_input, device=device)
        # Along the weight, as for the linear layer.
        grad = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
        grad = (grad / weight[0].numel() ** 0.5).to(of_input)
        threshold = thresholds(weight.shape, "row", device=device)
        geometry = ((1, 1), (1, 1), (1, 1), 1)
        last = torch.channels_last
        return x.to(memory_format=last), grad.to(memory_format=last), weight, threshold, geometry

    return make


def _of_convolutions(choose):
    """The tiles for 16-bit activations."""
    return _tiles(choose(tiles.Traits(BF16, False, True)), (), 1)


@KINDS
@_of_convolutions(tiles.conv_product_tiles)
def test_convolution_and_input_gradient(
    tile, of_input, dtype, conv_case, monkeypatch, float32_products
):
    if of_input == F32:
        float32_products(torch.backends.cudnn.conv, "tf32")
    monkeypatch.setattr(conv, "conv_product_tile", lambda *_: tile)
    sizes = tile.block_m, tile.block_r, tile.block_c
    x, grad, weight, threshold, geometry = conv_case(*sizes, of_input, dtype)
    hammer("masked_conv", x, weight, threshold, None, None, *geometry)
    hammer("masked_conv_grad_input", grad, x.shape, weight, threshold, *geometry)


@KINDS
@_tiles(tiles.GRAD_WEIGHT_TILES[90][:2], (), 2)
def test_weight_gradient_of_a_convolution(
    tile, of_input, dtype, conv_case, monkeypatch, float32_products
):
    if of_input == F32:
        float32_products(torch.backends.cudnn.conv, "tf32")
        of_tf32 = tiles.TF32_GRAD_WEIGHT_TILES[tile.block_r > 64]
        tile = dataclasses.replace(of_tf32, split=tile.split)
    monkeypatch.setattr(conv, "conv_grad_weight_tile", lambda *_: tile)
    sizes = tile.block_m * tile.split, tile.block_r, tile.block_c
    x, grad, weight, threshold, geometry = conv_case(*sizes, of_input, dtype)
    options = *geometry, "long_tailed", True
    hammer("masked_conv_grad_weight", grad, x, weight, threshold, *options)


@pytest.mark.parametrize("launcher", ["masked_product", "fused_grad_weight"])
def test_one_repetition_that_differs_is_noticed(launcher, device, monkeypatch):
    """The mistake: of the launches, the third changes the last bit of one number."""
    original, launches = getattr(linear, launcher), []

    def corrupted(*args, **options):
        result = original(*args, **options)
        launches.append(result)
        if len(launches) == 3:
            written = result if launcher == "masked_product" else args[4].tensor
            _bits(written).view(-1)[-1:].bitwise_xor_(1)
        return result

    monkeypatch.setattr(linear, launcher, corrupted)
    case = _gradient_case(F16, F32, (16, 16, 16), device)
    _, input, weight, threshold, *_ = case
    args = case if launcher == "fused_grad_weight" else (input, weight, threshold, None, 0.01)
    name = "masked_linear" + "_grad_weight" * (launcher == "fused_grad_weight")
    with pytest.raises(AssertionError, match=r"1 of 4 repetitions differ, the first: \[1\]"):
        hammer(name, *args, repeats=4)
