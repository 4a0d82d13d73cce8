"""RigL, worked out by hand: the schedule, who is pruned, who grows, which gradients there are."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.methods import RigL
from dst_kernels.methods.method import Layer
from tests.methods.small_layers import active, layers, momentum, put, run, weights


def gives_dense_gradient(layer: Layer) -> bool:
    (part,) = layer.parts
    layer.weight.grad = None
    part.module(torch.ones(1, layer.shape[1])).sum().backward()
    return bool(layer.weight.grad.all())


def test_the_smallest_go_and_the_largest_gradients_grow():
    method = RigL(*layers((2, 5)), 0.5, steps=4, every=1, rate=0.8, until=1.0)
    put(method, 0, [0.9, -0.1, 0.2, -0.8, 0.7] + 5 * [0.0])
    # At t = 1 of T = 4: 0.4 * (1 + cos(pi / 4)) = 0.683, and int(0.683 * 5) = 3 go.
    gradient = [9.0, -8, 1, 9, 2, -7, 3, 0, 0, 6]  # of the empty places, 1, 5 and 9 grow
    method.layers[0].weight.grad = torch.tensor(gradient).view(2, 5)
    run(method, 1)
    assert active(method) == [0, 1, 3, 5, 9]
    # The one at 1 was pruned and grew again: it keeps what it had. The others start at 0.
    assert weights(method) == pytest.approx([0.9, -0.1, 0, -0.8, 0, 0, 0, 0, 0, 0])
    assert momentum(method).nonzero().flatten().tolist() == [0, 1, 3]


def test_schedule_and_dense_gradients():
    method = RigL(*layers((4, 10)), 0.5, steps=12, every=3, rate=0.3, until=0.75)
    (layer,) = method.layers
    found = {}
    for step in range(1, 13):
        put(method, 0, [1.0] * 20 + [0.0] * 20)
        if gives_dense_gradient(layer):
            layer.weight.grad = torch.arange(40.0).view(4, 10)
            run(method, 1)
            found[step] = len(set(active(method)) - {*range(20)})
        else:
            layer.weight.grad = None  # not needed
            run(method, 1)
            assert active(method) == [*range(20)]
    # T = 9: 0.15 * (1 + cos(pi / 3)) * 20 = 4.5 and 0.15 * (1 + cos(2 pi / 3)) * 20 = 1.5
    assert found == {3: 4, 6: 1}


def test_without_a_gradient_the_error_says_when_to_call():
    method = RigL(*layers((2, 5)), 0.5, steps=10, every=1)
    with pytest.raises(RuntimeError, match=r"weight of 0, which is None.*before zero_grad"):
        method.step()
