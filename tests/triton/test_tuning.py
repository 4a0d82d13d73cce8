"""Tuning: off unless asked for, picks the fastest, remembers it on disk, loses nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton.language")

from dst_kernels.backends.triton import conv, tuning
from dst_kernels.backends.triton.tiles import (
    GRAD_WEIGHT_TILES,
    MORE_GRAD_WEIGHT_TILES,
    MORE_PRODUCT_TILES,
    PRODUCT_TILES,
    GradWeightTile,
    ProductTile,
    Traits,
    conv_grad_weight_tiles,
    conv_product_tiles,
    grad_weight_candidates,
    grad_weight_tile,
    pack_tile,
    post_tile,
    product_candidates,
    product_tile,
    stream_candidates,
)
from dst_kernels.backends.triton.weight import masked_weight, masked_weight_backward
from dst_kernels.reference.conv import Geometry

DEFAULT, FAST, SLOW = (ProductTile(16, 128, 32, 8, stages) for stages in (3, 2, 4))
TRAITS = Traits(torch.bfloat16, tf32=False, hopper=True)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A pretended GPU with a directory of its own; the list of tiles that were timed."""
    tiles = []

    def seconds(run, tile):
        run(tile)
        tiles.append(tile)
        return {2: 1e-6, 3: 2e-6, 4: 3e-6}[tile.stages]

    monkeypatch.setenv(tuning.CACHE_DIRECTORY, str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Pretended GPU/1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tiles


def tune(problem="problem", run=lambda tile: None):
    return tuning.tuned(problem, DEFAULT, [SLOW, FAST], run, torch.empty(0))


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_known", {})


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_is_off_unless_asked_for(monkeypatch, value, on):
    monkeypatch.delenv(tuning.AUTOTUNE, raising=False)
    if value is not None:
        monkeypatch.setenv(tuning.AUTOTUNE, value)
    assert tuning.tuning_is_on() is on


def test_the_fastest_is_timed_once_and_remembered(timed, monkeypatch):
    assert tune() == FAST
    assert sorted(tile.stages for tile in timed) == [2, 3, 4]
    assert tune() == FAST
    forget(monkeypatch)
    assert tune() == FAST
    assert len(timed) == 3, "neither this process nor the next times it again"
    assert tune("another problem") == FAST
    assert len(timed) == 6


def test_candidates_run_on_the_call_itself(timed):
    ran = []
    tune(run=ran.append)
    assert set(ran) == {DEFAULT, SLOW, FAST}


def test_without_a_gpu_or_in_a_capture_nothing_is_timed(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune() == DEFAULT
    monkeypatch.setattr(tuning, "gpu_name", lambda device: None)
    assert tune() == DEFAULT
    assert not timed


def test_answers_of_other_processes_are_kept(timed, monkeypatch, tmp_path):
    tune("mine")
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("tiles-pretended-gpu-1-")
    theirs = json.loads(file.read_text()) | {"theirs": {"from": "elsewhere"}}
    file.write_text(json.dumps(theirs))
    tune("mine too")
    assert set(json.loads(file.read_text())) == {"mine", "mine too", "theirs"}
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing half-written"


def test_a_broken_file_is_replaced(timed, monkeypatch, tmp_path):
    tune()
    (file,) = tmp_path.iterdir()
    file.write_text("{ half")
    forget(monkeypatch)
    assert tune() == FAST
    assert list(json.loads(file.read_text())) == ["problem"]


def test_another_source_or_version_has_another_file(timed, monkeypatch, tmp_path):
    tune()
    monkeypatch.setattr(tuning, "_fingerprint", lambda: "another")
    tune()
    assert len(list(tmp_path.iterdir())) == 2
    assert len(timed) == 6


@pytest.mark.parametrize(
    ("M", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (1000, 1024)]
)
def test_token_buckets(M, bucket):
    assert tuning.token_bucket(M) == bucket


def test_candidates_are_tiles_the_gate_knows():
    products = {*PRODUCT_TILES[90], *MORE_PRODUCT_TILES}
    gradients = {*GRAD_WEIGHT_TILES[90], *MORE_GRAD_WEIGHT_TILES}

    def whole(tile):
        return type(tile)(**{**vars(tile), "split": 1})

    for size in (16, 300, 5000):
        product = product_tile(size, 1024, 4096, TRAITS, False)
        for tile in product_candidates(product, TRAITS):
            assert isinstance(tile, ProductTile) and tile.split >= 1
            assert whole(tile) in products
        gradient = grad_weight_tile(size, 1024, 1024, TRAITS, False)
        for tile in grad_weight_candidates(gradient, TRAITS, False):
            assert isinstance(tile, GradWeightTile) and tile.split >= 1
            assert whole(tile) in gradients


def test_only_16_bit_products_on_hopper_have_more_candidates():
    for dtype, tf32, hopper in (
        (torch.bfloat16, False, True),
        (torch.float16, False, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, True),
        (torch.float32, False, True),
    ):
        traits = Traits(dtype, tf32, hopper)
        product = product_tile(16, 1024, 4096, traits, False)
        gradient = grad_weight_tile(300, 1024, 1024, traits, False)
        products = set(product_candidates(product, traits))
        gradients = set(grad_weight_candidates(gradient, traits, False))
        if dtype != torch.float32 and hopper:
            assert products >= set(MORE_PRODUCT_TILES) and gradients >= set(MORE_GRAD_WEIGHT_TILES)
        else:
            assert not products & set(MORE_PRODUCT_TILES)
            assert not gradients & set(MORE_GRAD_WEIGHT_TILES)


def test_tuned_convolutions_compute_the_same_in_tiles_the_gate_knows(timed, monkeypatch):
    input, weight = torch.randn(2, 3, 4, 5), torch.randn(4, 3, 1, 2)
    threshold, grad = torch.rand(4), torch.randn(2, 4, 4, 4)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)

    def results():
        return (
            *conv.masked_conv(input, weight, threshold, None, 0.01, geometry),
            conv.masked_conv_grad_input(grad, input.shape, weight, threshold, geometry),
            *conv.masked_conv_grad_weight(
                grad, input, weight, threshold, geometry, "triangular", True
            ),
        )

    plain = results()
    assert not timed
    monkeypatch.setenv(tuning.AUTOTUNE, "1")
    torch.testing.assert_close(results(), plain)
    traits = conv.traits_of(input, convolution=True)
    known = {*conv_product_tiles(traits), *conv_grad_weight_tiles(traits)}
    assert {dataclasses.replace(tile, split=1) for tile in timed} == known
    first = len(timed)
    results()
    assert len(timed) == first, "the answers are remembered"


def test_a_choice_goes_before_everything_else(timed, monkeypatch):
    asked = []

    def choose(default, candidates, run):
        asked.append((default, *candidates))
        run(SLOW)
        return SLOW

    ran = []
    with tuning.choosing(choose):
        assert tuning.tuning_is_on()
        assert tune(run=ran.append) == SLOW
    assert asked == [(DEFAULT, SLOW, FAST)] and ran == [SLOW]
    assert not timed and not tuning.tuning_is_on()
    assert tune() == FAST


def test_passes_over_a_weight_take_the_tile_that_is_chosen(poisoned):
    weight, grad = torch.randn(5, 70), torch.randn(5, 70)
    threshold = torch.rand(5)
    arguments = {
        masked_weight: (weight, threshold, 0.01, torch.float16),
        masked_weight_backward: (grad, weight, threshold, "long_tailed", True),
    }
    for op, args in arguments.items():
        plain, seen = op(*args), []

        def choose(default, candidates, run, seen=seen):
            seen.append(stream_candidates(default))
            assert candidates == seen[0]
            return candidates[len(seen) - 1]

        with tuning.choosing(choose):
            results = [op(*args), op(*args), op(*args)]
        assert len(seen) == 3
        for result in results:
            torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("columns", [64, 3000, 100000])
def test_candidates_of_passes_load_wide(columns):
    for default in (pack_tile(columns, 1), post_tile(columns, 1), pack_tile(columns, columns)):
        tiles = stream_candidates(default)
        assert len({default, *tiles}) == len(tiles) + 1 >= 4
        for tile in tiles:
            assert tile.rows * tile.block * 2 >= 16 * 32 * tile.warps
