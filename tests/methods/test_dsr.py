"""Dynamic sparse reparameterization, worked out by hand: the threshold, shares and places."""

from __future__ import annotations

import pytest

from dst_kernels.methods import DynamicSparseReparameterization as DSR
from tests.methods.small_layers import active, layers, put, run, weights

FIRST = [0.05, -0.02, 0.5, -0.6, 0.7, 0, 0, 0, 0, 0]
SECOND = [0.09, 0.9, -0.8, 0.2, 0.3, 0, 0, 0, 0, 0]


def method(exchange: int = 2, density: float = 0.5, **options: float) -> DSR:
    options = {"every": 1, "steps": 10, "threshold": 0.1, **options}
    return DSR(*layers((2, 5), (2, 5)), density, exchange=exchange, **options)


def test_what_is_below_the_threshold_goes_and_as_many_grow_where_more_stay():
    grown = []
    for seed in range(20):
        dsr = method(seed=seed)
        put(dsr, 0, FIRST)
        put(dsr, 1, SECOND)
        run(dsr, 1)  # 3 are pruned; 3 and 4 stay, so 3 * 3 // 7 = 1 grows in each
        assert weights(dsr, 0) == pytest.approx([0, 0, 0.5, -0.6, 0.7] + 5 * [0])
        assert weights(dsr, 1) == pytest.approx([0, 0.9, -0.8, 0.2, 0.3] + 5 * [0])
        assert not {0, 1} & set(active(dsr, 0)) and 0 not in active(dsr, 1)
        grown.append((len(active(dsr, 0)) - 3, len(active(dsr, 1)) - 4))
    assert set(grown) == {(1, 2), (2, 1)}  # the third in a random layer


@pytest.mark.parametrize(
    ("exchange", "threshold"), [(1, 0.05), (2, 0.05), (3, 0.1), (4, 0.2)]
)  # 3 are pruned: > 1.1, > 2.2, between 2.7 and 3.3, < 3.6
def test_the_threshold_halves_or_doubles(exchange: int, threshold: float):
    dsr = method(exchange)
    put(dsr, 0, FIRST)
    put(dsr, 1, SECOND)
    run(dsr, 1)
    assert dsr.threshold == threshold
    assert dsr.state_dict() == {"steps_done": 1, "threshold": threshold}


def test_each_layer_keeps_one_and_grows_no_more_than_it_has_room_for():
    dsr = method(exchange=4, density=0.6)  # 6 of 10
    put(dsr, 0, [0.04, 0.03, -0.05, 0.02] + 6 * [0.0])
    put(dsr, 1, [1.0, 2, 3, 4, 5, 6, 7, 8, 0, 0])
    run(dsr, 1)  # 3 are pruned; 1 and 8 stay: 3 // 9 = 0 and 24 // 9 = 2; the third in the first
    assert weights(dsr, 0) == pytest.approx([0, 0, -0.05] + 7 * [0])
    assert weights(dsr, 1) == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert (len(active(dsr, 0)), len(active(dsr, 1))) == (2, 10)


def test_nothing_goes_if_more_would_than_places_are_empty():
    dsr = method(density=0.9)  # 18 of 20
    put(dsr, 0, [0.01, 0.02, 0.03, 4, 5, 6, 7, 8, 9, 0])
    put(dsr, 1, [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    run(dsr, 1)
    assert active(dsr, 0) == active(dsr, 1) == [*range(9)]
    assert dsr.threshold == 0.05


def test_changes_come_every_so_many_steps_until_the_end():
    dsr = method(exchange=1, every=3, steps=10, until=0.7)
    changed = []
    for step in range(1, 11):
        put(dsr, 0, FIRST)
        put(dsr, 1, SECOND)
        dsr.threshold = 0.1
        run(dsr, 1)
        changed += [step] if dsr.threshold != 0.1 else []
    assert changed == [3, 6]
