"""Several threads in one model: one trains, another evaluates.

Races are played out step by step: a module in the middle of the network lets another thread run
just there. Two tests let threads run freely, with the interpreter switching as often as it can.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threads import (
    SCOPES,
    Checkpointed,
    Overlapping,
    assert_same_gradients,
    assert_same_state,
    batch,
    every_scope,
    every_way,
    in_a_thread,
    masked_by_hand,
    network,
    prepared,
    training_step,
)

import dst_kernels

# -- one trains, another evaluates -------------------------------------------------------------


PLACES = ("in the forward", "before backward", "in backward", "around a step", "across a step")


@every_way
@every_scope
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["linear", "recurrent"])
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_without_gradients_beside_training(way, scope, training, recurrent, place):
    """Leaves the trajectory as it is to the bit, and has the outputs of the current weights."""
    model, alone = (network(recurrent).train(training) for _ in range(2))
    optimizer, solo = prepared(way, model), prepared(way, alone)
    passing, x = model[3].actions, batch(9)
    others = []

    def look():
        with scope():
            output = model(x).clone()
        torch.testing.assert_close(output, masked_by_hand(model, x), rtol=1e-12, atol=1e-12)

    def look_around(pause):
        """Starts before a step and ends after it."""
        passing[threading.get_ident()] = pause
        with scope():
            assert model(x).isfinite().all()

    def meanwhile():
        in_a_thread(look)

    def begin():
        others.append(Overlapping(look_around))

    def look_in_backward(module, args, output):
        if threading.get_ident() == here:
            output.register_hook(lambda grad: in_a_thread(look))

    here = threading.get_ident()
    if place == "in the forward":
        passing[here] = meanwhile
    elif place == "across a step":
        passing[here] = begin
    elif place == "in backward":
        model[0].register_forward_hook(look_in_backward)
    for step in range(4):
        if place == "around a step":
            begin()
        training_step(model, optimizer, step, meanwhile if place == PLACES[1] else lambda: None)
        while others:
            others.pop().result()
        training_step(alone, solo, step)
    assert_same_state(model, alone)


@every_way
@every_scope
@pytest.mark.parametrize("recurrent", [False, True], ids=["linear", "recurrent"])
@pytest.mark.parametrize("reset_ratio", [None, 0.01])
def test_threads_that_run_freely(way, scope, recurrent, reset_ratio):
    """Disturb neither the gradients nor the trajectory of the one that trains.

    With a guard, both threads may write the thresholds, so that only the gradients are certain.
    """
    model, alone = (network(recurrent, reset_ratio=reset_ratio) for _ in range(2))
    optimizer, solo = prepared(way, model), prepared(way, alone)
    done, count = threading.Event(), 0

    def look():
        nonlocal count
        with scope():
            while not done.is_set():
                assert model(batch(9)).isfinite().all()
                count += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            try:
                for step in range(100):
                    training_step(model, optimizer, step)
            finally:
                done.set()
            looking.result(60)
    finally:
        sys.setswitchinterval(interval)
    assert count > 10
    if reset_ratio is None:
        for step in range(100):
            training_step(alone, solo, step)
        assert_same_state(model, alone)


@pytest.mark.parametrize("way", ["layer by layer", "grouped"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["linear", "recurrent"])
def test_threads_of_every_gradient_mode(way, recurrent):
    """Get the outputs and gradients of one thread."""
    model = network(recurrent).eval()
    prepared(way, model)
    parameters = list(model.parameters())
    x = batch().requires_grad_()
    solo = network(recurrent).eval()
    expected = solo(x)
    gradients = torch.autograd.grad(expected.sum(), [x, *solo.parameters()])

    def without_gradients(scope):
        with scope():
            return [torch.equal(model(x).clone(), expected) for _ in range(50)]

    def of_the_input():
        return [
            torch.equal(torch.autograd.grad(model(x).sum(), x)[0], gradients[0]) for _ in range(50)
        ]

    def of_parameters():
        made = [torch.autograd.grad(model(x).sum(), parameters) for _ in range(50)]
        return [
            all(torch.equal(*pair) for pair in zip(each, gradients[1:], strict=True))
            for each in made
        ]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(without_gradients, scope) for scope in SCOPES.values()]
            futures += [pool.submit(of_the_input), pool.submit(of_parameters)]
            results = [future.result(60) for future in futures]
    finally:
        sys.setswitchinterval(interval)
    assert all(map(all, results))


def test_backward_in_another_thread():
    """Frees what was kept for it, and recomputes checkpoints there."""
    plain, grouped = Checkpointed(False), dst_kernels.group_(Checkpointed(False))
    for step in range(3):
        plain(batch(step)).square().mean().backward()
        in_a_thread(grouped(batch(step)).square().mean().backward)
    assert_same_gradients(grouped, plain)


# -- activation checkpoints --------------------------------------------------------------------


@every_way
@every_scope
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_beside_a_forward_without_gradients(way, scope, reentrant):
    """Save in backward what they saved in forward, while another thread evaluates."""
    model, alone = Checkpointed(reentrant), network()
    optimizer, solo = prepared(way, model), prepared(way, alone)
    here = threading.get_ident()

    def look():
        with scope():
            assert model(batch(9).clone()).isfinite().all()

    model.inner[3].actions[here] = lambda: in_a_thread(look)
    for step in range(4):
        training_step(model, optimizer, step)
        training_step(alone, solo, step)
    for name, value in alone.state_dict().items():
        actual = model.inner.state_dict()[name]
        torch.testing.assert_close(actual, value, rtol=1e-11, atol=1e-13)
