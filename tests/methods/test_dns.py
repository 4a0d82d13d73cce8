"""Dynamic network surgery, worked out by hand: thresholds, hysteresis, splicing, the schedule."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.methods import DynamicNetworkSurgery
from tests.methods.small_layers import active, layers, run

UP_TO_TEN = [1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]  # |w|: mean 5.5, variance 8.25


def start(*scales: float, **options: object) -> DynamicNetworkSurgery:
    model, optimizer = layers(*[(2, 5)] * len(scales))
    with torch.no_grad():
        for layer, scale in zip(model, scales, strict=True):
            layer.weight.copy_(scale * torch.tensor(UP_TO_TEN).view(2, 5))
    return DynamicNetworkSurgery(
        model, optimizer, **{"steps": 100, "begin": 0.0, "gamma": 0.0, **options}
    )


def test_thresholds_hysteresis_and_splicing():
    method = start(1.0, c=0.5)  # tau = 5.5 + 0.5 * 2.872 = 6.936; 0.9 tau = 6.24, 1.1 tau = 7.63
    assert method.thresholds == [pytest.approx(5.5 + 0.5 * 8.25**0.5)]
    assert active(method) == [6, 7, 8, 9]
    weight = method.layers[0].weight.view(-1)
    assert weight.tolist() == UP_TO_TEN  # pruned weights keep their values
    with torch.no_grad():
        weight[[0, 1]] = torch.tensor([7.7, 7.5])  # above 1.1 tau, and not
        weight[[6, 8, 9]] = torch.tensor([6.1, -6.3, torch.nan])  # below 0.9 tau, and not
    run(method, 1)
    assert active(method) == [0, 7, 8, 9]
    assert method.thresholds == [pytest.approx(6.936, abs=1e-3)]  # they never change


def test_pruned_weights_have_the_gradient_of_the_masked_network():
    method = start(1.0, c=0.5)
    (layer,) = method.layers
    inputs = torch.tensor([[1.0, 2, 3, 4, 5]])
    output = method.model(inputs)
    assert output.tolist() == [[0, 7 * 2 - 8 * 3 + 9 * 4 - 10 * 5]]  # 6, 7, 8 and 9 are kept
    output.sum().backward()
    assert layer.weight.grad.tolist() == inputs.expand(2, 5).tolist()


def test_one_c_for_all_layers_follows_from_the_density():
    method = start(1.0, 0.1, density=0.5)  # alike but for their scale, so 5 of each are above tau
    assert method.thresholds == [pytest.approx(5.5), pytest.approx(0.55)]
    assert active(method, 0) == active(method, 1) == [4, 5, 6, 7, 8, 9]  # 5 is above 0.9 * 5.5
    method = start(1.0, 0.1, density=1.0)
    assert active(method, 0) == active(method, 1) == [*range(10)]
    torch.manual_seed(0)
    model, optimizer = layers((30, 50), (20, 30))
    method = DynamicNetworkSurgery(model, optimizer, 0.2, steps=10, begin=0.0)
    above = [
        int((layer.weight.abs() > tau).sum())
        for layer, tau in zip(method.layers, method.thresholds, strict=True)
    ]
    assert sum(above) == 0.2 * 2100


def test_a_threshold_is_never_below_zero():
    method = start(1.0, c=-3.0)
    assert method.thresholds == [0]
    with torch.no_grad():
        method.layers[0].weight.view(-1)[3] = 0
    run(method, 1)
    assert active(method) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_changes_begin_and_end():
    method = start(1.0, c=0.5, steps=10, begin=0.3, until=0.6)
    (layer,) = method.layers
    changed = []
    for step in range(1, 11):
        layer.set_mask(torch.ones(2, 5, dtype=torch.bool))
        run(method, 1)
        changed += [step] if active(method) == [6, 7, 8, 9] else []
        assert bool(method.thresholds) is (step >= 3)
    assert changed == [3, 4, 5]


def test_changes_become_rare():
    method = start(1.0, c=0.5, begin=0.1, until=1.0, gamma=0.5, power=2.0)
    (layer,) = method.layers
    for done, probability in ((0, 1.0), (2, 0.25), (6, 1 / 16)):
        changes = 0
        for seed in range(500):
            method.seed, method.steps_done = seed, 10 + done - 1
            layer.set_mask(torch.ones(2, 5, dtype=torch.bool))
            run(method, 1)
            changes += active(method) == [6, 7, 8, 9]
        spread = (500 * probability * (1 - probability)) ** 0.5
        assert abs(changes - 500 * probability) <= 4 * spread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of density and c must be given, but none is"),
        ({"density": 0.5, "c": 3.0}, "exactly one of density and c must be given, but both are"),
        ({"c": "3"}, "c must be a finite number, but is '3'"),
        ({"c": 1.0, "begin": 0.8}, "until must be at least begin, 0.8, but is 0.75"),
        ({"c": 1.0, "gamma": -1}, "gamma must be at least 0 and finite, but is -1"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        start(1.0, **{"gamma": 0.0, **options})
