"""Magnitude pruning, worked out by hand: the cubic ramp, the scopes, one shot."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.methods import MagnitudePruning
from tests.methods.small_layers import active, layers, momentum, put, run, weights

FIRST, SECOND = [9.0, -8, 7, -6, 5, 1, -2, 3], [0.9, -0.8, 0.7, -0.6, 0.5, 0.4, -0.3, 4]


def start(**options: object) -> MagnitudePruning:
    pair = layers((2, 4), (2, 4))
    with torch.no_grad():
        for parameter, values in zip(pair[0], (FIRST, SECOND), strict=True):
            parameter.weight.copy_(torch.tensor(values).view(2, 4))
    return MagnitudePruning(*pair, 0.5, **{"steps": 20, "every": 2, **options})


def test_the_ramp_is_cubic_and_what_is_pruned_stays_so():
    method = start(begin=0.1, until=0.5)  # steps 2 to 10
    put(method, 0, FIRST, 8 * [1.0])
    put(method, 1, SECOND, 8 * [1.0])
    counts = []
    for step in range(1, 21):
        run(method, 1)
        counts.append(len(active(method, 0)) + len(active(method, 1)))
        if step == 4:
            with torch.no_grad():  # a pruned weight that something makes large stays pruned
                method.layers[1].weight.view(-1)[6] = 100
    # 16 * (0.5 + 0.5 * (1 - p)^3): p = 1/4: 11.375; 1/2: 9; 3/4: 8.125; 1: 8
    assert counts == 3 * [16] + 2 * [11] + 2 * [9] + 13 * [8]
    assert active(method, 0) == [*range(5), 6, 7]  # the eight largest of all
    assert active(method, 1) == [7]
    assert weights(method, 0) == [9, -8, 7, -6, 5, 0, -2, 3]
    assert momentum(method, 0).tolist() == [1, 1, 1, 1, 1, 0, 1, 1]


def test_each_layer_keeps_the_share_and_the_last_change_is_never_left_out():
    method = start(begin=0.0, until=0.25, every=3, scope="layer")  # 3, and 5
    counts = []
    for _ in range(6):
        run(method, 1)
        counts.append((len(active(method, 0)), len(active(method, 1))))
    assert counts == 2 * [(8, 8)] + 2 * [(4, 4)] + 2 * [(4, 4)]  # 8 * (0.5 + 0.5 * 0.064) = 4.256
    assert active(method, 1) == [0, 1, 2, 7]


@pytest.mark.parametrize(("share", "step"), [(0.0, 0), (0.25, 5)])
def test_at_once(share: float, step: int):
    method = start(begin=share, until=share)
    for done in range(8):
        assert len(active(method, 1)) == (1 if done >= step else 8)
        run(method, 1)
    assert active(method, 0) == [*range(5), 6, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 0.8}, "until must be at least begin, 0.8, but is 0.75"),
        ({"scope": "all"}, "scope must be 'global' or 'layer', but is 'all'"),
        ({"begin": 2}, "begin must be at most 1, but is 2"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        start(**options)
