"""SET, worked out by hand: who is pruned, who grows, and when."""

from __future__ import annotations

import math

import pytest
import torch

from dst_kernels.methods import SET
from tests.methods.small_layers import active, layers, momentum, put, run, weights

FAR, NEAR = [0.9, -0.8, 0.7, -0.6], [0.1, -0.2]
WEIGHT = [*FAR, *NEAR, 0.5, -0.5] + 12 * [0.0]  # 4 positive ones and 4 negative


def test_each_sign_loses_its_share_nearest_zero_and_as_many_grow():
    method = SET(*layers((4, 5)), 0.4, every=3, rate=0.3)  # int(0.3 * 4) = 1 of each sign
    put(method, 0, WEIGHT)
    run(method, 3)
    assert weights(method) == pytest.approx(WEIGHT)  # the change waits for the next step
    run(method, 1)
    assert weights(method)[:8] == pytest.approx([*FAR, 0, 0, 0.5, -0.5])
    assert len(active(method)) == 8
    anew = {4, 5, *active(method)} - {0, 1, 2, 3, 6, 7}  # pruned, or grown
    assert [i for i in range(20) if momentum(method)[i] == 0] == sorted(anew)
    before = active(method)
    run(method, 2)
    assert active(method) == before
    run(method, 1)  # the two that grew are still 0: they go; int(0.3 * 3) = 0 of each sign
    assert len(active(method)) == 8 and active(method) != before
    assert weights(method)[:8] == pytest.approx([*FAR, 0, 0, 0.5, -0.5])


def test_whatever_the_sign_the_smallest_go_and_do_not_come_back_at_once():
    method = SET(*layers((4, 5)), 0.4, every=1, rate=0.3, separate_signs=False)
    put(method, 0, [0.9, 0.8, 0.7, 0.6, -0.1, -0.2, -0.3, 0.5] + 12 * [0.0])
    run(method, 2)  # int(0.3 * 8) + 1 = 3
    assert weights(method)[:8] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0, 0, 0, 0.5])
    assert active(method)[:5] == [0, 1, 2, 3, 7]
    assert len(active(method)) == 8


def test_at_most_as_many_go_as_places_are_empty():
    method = SET(*layers((2, 5)), 0.9, every=1, rate=0.5, separate_signs=False)
    put(method, 0, [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    run(method, 2)
    assert weights(method) == [0, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert active(method) == [*range(1, 10)]


@pytest.mark.parametrize("separate_signs", [True, False])
def test_a_weight_that_diverged_stays_to_be_seen(separate_signs: bool):
    method = SET(*layers((2, 5)), 0.4, every=1, rate=0.5, separate_signs=separate_signs)
    put(method, 0, [math.nan, 3, -2, 1] + 6 * [0.0])
    run(method, 2)
    assert math.isnan(weights(method)[0]) and 0 in active(method)
    assert len(active(method)) == 4


@pytest.mark.parametrize("separate_signs", [True, False])
def test_a_full_layer_does_not_change(separate_signs: bool):
    method = SET(*layers((2, 3)), 1.0, every=1, separate_signs=separate_signs)
    put(method, 0, [1.0, -2, 3, -4, 5, -6])
    run(method, 3)
    assert weights(method) == [1, -2, 3, -4, 5, -6]


def test_places_are_drawn_uniformly():
    method = SET(*layers((2, 5)), 0.1, every=1, rate=1.0)
    counts = torch.zeros(10)
    run(method, 1)
    for _ in range(2000):
        run(method, 1)  # the only weight is 0, so it goes
        counts[active(method)] += 1
    assert counts.sum() == 2000
    assert (counts - 200).abs().max() < 5 * 200**0.5  # five standard deviations


def test_the_start_has_the_densities_of_erdos_renyi():
    method = SET(*layers((300, 784), (100, 300), (10, 100)), 0.05, every=1)
    counts = [int(layer.mask.sum()) for layer in method.layers]
    assert counts == [9051, 3340, 919]  # 13,310 shared out as 1084 : 400 : 110
