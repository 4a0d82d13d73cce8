"""Sparse momentum, worked out by hand: contributions, caps, the correction and its repair."""

from __future__ import annotations

import random

import pytest
import torch

import dst_kernels
from dst_kernels.methods import SparseMomentum
from tests.methods.small_layers import active, layers, momentum, put, run, weights

CONSTANT = {"every": 1, "steps": 100, "rate": 0.5, "final_rate": 0.5}


def counts(method: SparseMomentum) -> list[int]:
    return [len(active(method, i)) for i in range(len(method.layers))]


def test_who_goes_and_who_grows():
    method = SparseMomentum(*layers((2, 5), (2, 5)), 0.4, **CONSTANT)
    run(method, 1)
    put(method, 0, [0.9, -0.1, 0.2, 0.8] + 6 * [0.0], [3, 4, 2, -3, 9, 1, 0, -8, 0, 3])
    put(method, 1, [0.9, -0.1, 0.2, 0.8] + 6 * [0.0], [1, 1, 1, -1, 9, 1, 0, -8, 0, 2])
    run(method, 1)  # 2 of 4 go in each; contributions 3 : 1, so 3 and 1 grow
    assert active(method, 0) == [0, 1, 3, 4, 7]
    assert active(method, 1) == [0, 3, 4]
    # The one at 1 was pruned and grew again: it keeps its value. The others start at 0.
    assert weights(method, 0) == pytest.approx([0.9, -0.1, 0, 0.8, 0, 0, 0, 0, 0, 0])
    assert momentum(method, 0).tolist() == [3, 4, 2, -3, 9, 1, 0, -8, 0, 3]  # stays dense


@pytest.mark.parametrize("keep_density", [False, True])
def test_caps_and_the_correction(keep_density: bool):
    method = SparseMomentum(*layers((1, 4), (4, 5)), 0.5, keep_density=keep_density, **CONSTANT)
    run(method, 1)
    put(method, 0, [1.0, 2, 0, 0], 4 * [9.0])
    put(method, 1, [*range(1, 11)] + 10 * [0], 20 * [1.0])
    run(method, 1)
    # 1 + 5 go; shares 0.9 and 0.1: 5.4 and 0.6. The first layer has room for 3.
    if keep_density:
        assert counts(method) == [4, 8]  # 3 and 0.6 + 2.4 = 3
        return
    assert counts(method) == [3, 8]  # 0.99 * 3 = 2.97, and 0.6 + 2.43 = 3.03, both rounded down
    assert method.correction == 0.75 * 1 + 1  # 11 of 12 are there
    run(method, 1)
    # 2 + 4 go, 7.75 shall grow: 6.975 and 0.775. The first has room for 0.99 * 3, so the other
    # gets 4.78: 2 and 4 grow. 11 are there again.
    assert counts(method) == [3, 8]
    assert method.correction == pytest.approx(0.25 * 1.75 + 0.75 * 1 + (1 + 1) / 2)


def test_a_nearly_full_layer_that_contributes_much_loses_few():
    method = SparseMomentum(*layers((2, 5), (2, 5)), 0.5, **CONSTANT)
    for contribution, left in ((9.0, 8), (0.5, 4)):  # 0.1 * 9, or half of 9, rounded up, go
        method.steps_done = 1
        put(method, 0, [*range(1, 10), 0], 10 * [contribution])
        put(method, 1, [1.0] + 9 * [0.0])
        run(method, 1)
        kept = [i for i in range(10) if i in active(method, 0) and weights(method, 0)[i]]
        assert kept[-left:] == [*range(9 - left, 9)]
        assert (sum(counts(method)) - 1 >= left) and method.changes


def test_the_rate_falls_along_a_cosine():
    method = SparseMomentum(*layers((10, 20)), 0.5, every=1, steps=3, keep_density=True)
    pruned = []
    for done in (1, 2, 5):  # the change after step 2, 3 and 6
        method.steps_done = done
        put(method, 0, [1.0] * 100 + [0.0] * 100, [1.0] * 100 + [2.0] * 100)
        run(method, 1)
        pruned.append(100 - sum(i < 100 for i in active(method)))
    # 0.495 * (1 + cos(2 pi / 3)) / 2 + 0.005 = 0.12875, then 0.005 from the end on
    assert pruned == [13, 1, 1]


def test_density_can_be_kept_exactly_whatever_the_contributions():
    method = SparseMomentum(
        *layers((1, 4), (3, 5), (4, 5), (10, 10)), 0.6, **CONSTANT, keep_density=True
    )
    method.steps_done = 1
    chance = random.Random(0)
    for _ in range(200):
        for layer in method.layers:
            scale = 10 ** chance.uniform(-3, 3)
            state = method.optimizer.state[layer.weight]
            state["momentum_buffer"] = scale * torch.randn_like(layer.weight)
        run(method, 1)
        assert sum(counts(method)) == method.start_count == round(0.6 * 139)


def test_momentum_of_adam_and_of_none():
    model, _ = layers((2, 5))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer \(SGD\) keeps no momentum of the weight of 0"):
        SparseMomentum(model, plain, 0.5, **CONSTANT)
    with pytest.raises(ValueError, match="Adagrad"):
        SparseMomentum(model, torch.optim.Adagrad(model.parameters()), 0.5, **CONSTANT)
    adam = dst_kernels.optim.DSTAdamW(model)
    method = SparseMomentum(model, adam, 0.5, **CONSTANT)
    method.step()
    with pytest.raises(RuntimeError, match=r"weight of 0, which had no gradient"):
        method.step()
    model(torch.randn(3, 5)).sum().backward()
    adam.step()
    state = adam.state[method.layers[0].weight]
    expected = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()
    assert torch.equal(method._momentum(method.layers[0]), expected)
