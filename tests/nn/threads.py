"""A network in whose midst another thread may run, and the ways to train it."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dst_kernels
from dst_kernels.nn import MaskedLinear, MaskedLSTM
from dst_kernels.optim import DSTSGD, DSTAdamW

SCOPES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
every_scope = pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
WAYS = ("layer by layer", "grouped", "DSTSGD", "DSTAdamW")
every_way = pytest.mark.parametrize("way", WAYS)


class Point(nn.Module):
    """Passes its input on, and calls what the current thread has asked for."""

    def __init__(self):
        super().__init__()
        self.actions = {}

    def forward(self, x):
        action = self.actions.get(threading.get_ident())
        if action is not None:
            action()
        return x

    def __deepcopy__(self, memo):
        return Point()


class LastStep(nn.Module):
    """Runs an LSTM over the input and its negative."""

    def __init__(self, **options):
        super().__init__()
        self.lstm = MaskedLSTM(8, 7, **options)

    def forward(self, x):
        return self.lstm(torch.stack([x, -x]))[0][-1]


def network(recurrent=False, **options):
    torch.manual_seed(0)
    middle = LastStep(**options) if recurrent else MaskedLinear(8, 7, **options)
    model = nn.Sequential(
        MaskedLinear(6, 8, **options), nn.Tanh(), middle, Point(), nn.Linear(7, 7),
        MaskedLinear(7, 4, **options),
    ).double()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "threshold" in name:
                parameter.uniform_(0, 0.1)
    return model


def prepared(way, model):
    """Return the model's optimizer after the model was grouped where the way asks for it."""
    if way == "DSTSGD":
        return DSTSGD(model, lr=0.05, momentum=0.9)
    if way == "DSTAdamW":
        return DSTAdamW(model, lr=0.01)
    if way == "grouped":
        dst_kernels.group_(model)
    return torch.optim.SGD(dst_kernels.parameter_groups(model), lr=0.05, momentum=0.9)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64)


def expected_gradients(model, optimizer):
    """Yield what must have a gradient before a step: thresholds of deferred weights have none."""
    for name, parameter in model.named_parameters():
        if isinstance(optimizer, torch.optim.SGD) or "threshold" not in name:
            yield name, parameter


def training_step(model, optimizer, step=0, before_backward=lambda: None):
    optimizer.zero_grad()
    loss = model(batch(step)).square().mean()
    before_backward()
    loss.backward()
    for name, parameter in expected_gradients(model, optimizer):
        assert parameter.grad is not None, f"{name} has no gradient in step {step}"
    optimizer.step()


def masked_by_hand(model, x):
    """Compute the output of a dense copy whose weights are W * M."""
    return dst_kernels.finalize_(copy.deepcopy(model))(x)


def assert_same_state(actual, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(60)


class Overlapping:
    """Runs a function in a thread, which waits where it calls `pause` until it may go on."""

    def __init__(self, function):
        self._paused, self._resumed = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(function, self._pause)
        self._future.add_done_callback(lambda _: self._paused.set())
        assert self._paused.wait(60)

    def _pause(self):
        self._paused.set()
        assert self._resumed.wait(60)

    def result(self):
        self._resumed.set()
        with self._pool:
            return self._future.result(60)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x):
        x = checkpoint(self.inner[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return self.inner[5](checkpoint(self.inner[2:5], x, use_reentrant=self.reentrant))


def assert_same_gradients(actual, expected):
    """Compare to rounding, as torch's own layers sum the gradients of biases in their own way."""
    for ours, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
