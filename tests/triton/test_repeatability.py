"""The same bits every time, whether or not torch is asked for deterministic algorithms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_cases import normal, run, thresholds

from dst_kernels.backends.triton import linear
from dst_kernels.backends.triton.tiles import GradWeightTile, ProductTile

F16, F32 = torch.float16, torch.float32


def splitting(choose, split):
    return lambda *args, **options: dataclasses.replace(choose(*args, **options), split=split)


@pytest.fixture
def split_tiles(device, monkeypatch):
    """Sums shared by several programs, whose order must not matter.

    On a GPU in the tiles that are chosen there, in the interpreter in such as it has done soon.
    """
    if device.type == "cuda":
        monkeypatch.setattr(linear, "product_tile", splitting(linear.product_tile, 3))
        monkeypatch.setattr(linear, "grad_weight_tile", splitting(linear.grad_weight_tile, 2))
        return
    product = ProductTile(block_m=32, block_r=16, block_c=16, warps=4, stages=2, split=3)
    gradient = GradWeightTile(block_r=16, block_c=128, block_m=16, warps=4, stages=2, split=2)
    monkeypatch.setattr(linear, "product_tile", lambda *_, **__: product)
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_, **__: gradient)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def everything(granularity, of_input, device):
    """All ops, in sums whose steps fill a GPU's pipelines many times: none is a multiple of 32."""
    M, N, K = (1100, 1070, 4170) if device.type == "cuda" else (36, 20, 200)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        weight, input = normal(N, K, device=device), normal(M, K, device=device).to(of_input)
        grad, threshold = normal(M, N, device=device), thresholds((N, K), granularity)
    threshold, grad = threshold.to(device), grad.to(of_input)
    options = "long_tailed", True
    return (
        *run("masked_linear", input, weight, threshold, None, 0.01),
        *run("masked_linear", input, weight, threshold, None, 1.0),
        *run("masked_linear_grad_input", grad, weight, threshold),
        *run("masked_linear_grad_weight", grad, input, weight, threshold, *options),
        *run("masked_weight", weight, threshold, 0.01, of_input),
        *run("masked_weight_backward", weight.to(of_input), weight, threshold, *options),
    )


CASES = pytest.mark.parametrize(
    ("granularity", "of_input"), [("row", F16), ("element", F32)], ids=str
)


def assert_bitwise_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@CASES
def test_repeats_are_bitwise_equal(granularity, of_input, device):
    assert_bitwise_equal(*(everything(granularity, of_input, device) for _ in range(2)))


@CASES
def test_split_sums_are_bitwise_equal_in_deterministic_mode_too(
    granularity, of_input, device, split_tiles, request
):
    first, second = (everything(granularity, of_input, device) for _ in range(2))
    assert_bitwise_equal(first, second)
    request.getfixturevalue("deterministic")
    assert_bitwise_equal(first, everything(granularity, of_input, device))


def test_an_output_does_not_depend_on_the_rest_of_the_batch_within_a_tile(device):
    """Tokens beyond the batch are zeros, not whatever lies there."""
    N, K = (300, 4170) if device.type == "cuda" else (20, 70)
    weight, threshold = normal(N, K, device=device), thresholds((N, K), "row", device=device)
    input = normal(16, K, device=device)
    whole, _ = run("masked_linear", input, weight, threshold, None, None)
    for size in (1, 7, 15):
        part, _ = run("masked_linear", input[:size], weight, threshold, None, None)
        assert torch.equal(part, whole[:size])
