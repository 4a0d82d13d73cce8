"""DEEP-R, worked out by hand: signs, the walk, who goes dormant and who wakes, the soft variant."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.methods import DeepR
from dst_kernels.methods.deepr import draw_places
from tests.methods.small_layers import active, layers, momentum, put, run

SIGNS = [1, -1, 1, -1, 1, 1, -1, -1, 1, 1]


def method(*shapes: tuple[int, int], **options: object) -> DeepR:
    """Return a rule whose optimizer has lr 0.1, with signs as above in each layer of 10."""
    found = DeepR(*layers(*(shapes or [(2, 5)])), 0.5, **{"l1": 0.0, "noise": 0.0, **options})
    for layer, signs in zip(found.layers, found.signs, strict=True):
        if signs.numel() == 10:
            signs.copy_(torch.tensor(SIGNS).view(2, 5))
        assert set(signs.unique().tolist()) == {-1, 1}
        assert layer.weight.shape == signs.shape
    return found


def test_what_crosses_zero_goes_dormant_and_as_many_wake_with_their_sign():
    woken = set()
    for seed in range(30):
        rule = method(l1=0.5, seed=seed)  # theta falls by 0.1 * 0.5
        put(rule, 0, [0.3, -0.2, 0.04, 0.01, 0.06, 0, 0, 0, 0, 0], 10 * [1.0])
        run(rule, 1)
        weight = rule.layers[0].weight.detach().flatten()
        assert weight[[0, 1, 4]].tolist() == pytest.approx([0.25, -0.15, 0.01])
        # 0.04 would be -0.01, and 0.01 is on the wrong side: the optimizer has moved it across.
        new = set(active(rule)) - {0, 1, 4}
        assert len(new) == 2
        assert all(weight[i].item() == pytest.approx(1e-12 * SIGNS[i]) for i in new)
        assert not weight[[i for i in range(10) if i not in active(rule)]].any()
        assert momentum(rule).tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
        woken |= new
    assert woken == {2, 3, 5, 6, 7, 8, 9}


def test_the_walk_has_the_size_of_the_noise_and_the_learning_rate_of_the_group():
    rule = method((100, 200), noise=3.0)
    before = torch.where(rule.layers[0].mask, 10.0 * rule.signs[0], 0)
    put(rule, 0, before.flatten().tolist())
    rule.optimizer.param_groups[0]["lr"] = 0.2
    run(rule, 1)
    moves = (rule.layers[0].weight - before)[rule.layers[0].mask]
    assert len(moves) == 10_000
    assert abs(moves.std() - 0.6) < 0.6 * 0.04  # five standard errors are 0.035
    assert abs(moves.mean()) < 0.6 * 0.05


def test_the_start_is_half_normal_by_the_number_of_inputs():
    rule = method((50, 400))
    (layer,), (signs,) = rule.layers, rule.signs
    theta = (layer.weight * signs)[layer.mask]
    assert len(theta) == 10_000 and theta.min() > 0
    assert abs(theta.square().mean() - 1 / 400) < 0.07 / 400
    assert abs(signs.float().mean()) < 0.04


@pytest.mark.parametrize("per_layer", [True, False])
def test_counts_are_exact_by_layer_or_in_total(per_layer: bool):
    rule = method((4, 10), (8, 10), l1=0.5, noise=1.0, per_layer=per_layer)
    seen = set()
    for _ in range(50):
        run(rule, 1)
        counts = [len(active(rule, 0)), len(active(rule, 1))]
        assert sum(counts) == 60
        seen.add(counts[0])
        for layer, signs in zip(rule.layers, rule.signs, strict=True):
            assert torch.equal(layer.mask, layer.weight * signs > 0)
    assert (seen == {20}) is per_layer


def test_places_are_distinct_and_uniform():
    taken = torch.arange(100) % 3 == 0  # 66 are free
    generator = torch.Generator().manual_seed(0)
    for count in (12, 50):  # by rejection, and by a permutation
        drawn = torch.zeros(100)
        for _ in range(1000):
            places = draw_places(taken, 66, count, generator)
            assert len(places.unique()) == count
            drawn[places] += 1
        share = count / 66
        spread = (1000 * share * (1 - share)) ** 0.5
        assert not drawn[taken].any()
        assert (drawn[~taken] - 1000 * share).abs().max() < 5 * spread


def test_soft_weights_come_back_and_stop_at_a_limit():
    # T = 0.1 * 0.2^2 / 2 = 0.002; theta stops at -(0.5 / 0.5) * 0.002 / 0.02 = -0.1
    rule = method(soft=True, l1=0.02, noise=0.2)
    theta = torch.tensor([0.5, 1e-3, 0.3, -0.1, -1e-3, -0.05, -5.0, 0.4, 1.0, -0.1])
    seen = {True: set(), False: set()}
    for _ in range(50):
        put(rule, 0, [0.0] * 10, 10 * [1.0])
        with torch.no_grad():
            rule.layers[0].weight.copy_((theta * torch.tensor(SIGNS)).view(2, 5))
        rule.layers[0].set_mask((theta > 0).view(2, 5))
        run(rule, 1)
        now = (rule.layers[0].weight.detach() * rule.signs[0]).flatten()
        assert now.min() == pytest.approx(-0.1) and now[6] == pytest.approx(-0.1)
        assert active(rule) == (now > 0).nonzero().flatten().tolist()
        assert momentum(rule).tolist() == (now > 0).float().tolist()
        for i in range(10):
            seen[bool(now[i] > 0)].add(i)
    assert seen == {True: {0, 1, 2, 4, 7, 8}, False: {1, 3, 4, 5, 6, 9}}


def test_soft_weights_without_gradients_approach_the_density():
    rule = DeepR(*layers((50, 100)), 0.2, soft=True, l1=0.05, noise=1.0)
    run(rule, 3000)  # T = 0.05, so active theta are about 1 and a step is 0.1
    shares = []
    for _ in range(10):
        run(rule, 100)
        shares.append(len(active(rule)) / 5000)
    assert sum(shares) / 10 == pytest.approx(0.2, abs=0.02)


def test_soft_needs_noise_and_decay():
    with pytest.raises(ValueError, match="noise must be positive and finite, but is 0"):
        method(soft=True, l1=1e-5)
    with pytest.raises(TypeError, match="soft must be True or False, but is 1"):
        method(soft=1)
