"""Recurrent modules that several threads call."""

from __future__ import annotations

import copy

import pytest
import torch
from threads import Overlapping, every_scope
from torch import nn
from torch.overrides import TorchFunctionMode

import dst_kernels
from dst_kernels.nn import MaskedGRU, MaskedLSTM, MaskedRNN

RECURRENT = (
    (MaskedLSTM, {"num_layers": 2}),
    (MaskedLSTM, {"proj_size": 2}),
    (MaskedGRU, {"bias": False}),
    (MaskedRNN, {}),
)
every_recurrent_module = pytest.mark.parametrize(("kind", "options"), RECURRENT)


def recurrent(kind, options):
    torch.manual_seed(0)
    module = kind(5, 6, **options).double().eval()
    for part in module.masked_weights():
        nn.init.uniform_(part.threshold, 0, 0.2)
    return module, torch.randn(3, 2, 5, dtype=torch.float64)


class Watching(TorchFunctionMode):
    """Calls `watch` before every call of torch in this thread."""

    def __init__(self, watch):
        super().__init__()
        self.watch, self.calls = watch, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        self.watch(self.calls)
        return function(*args, **(kwargs or {}))


@every_recurrent_module
@every_scope
def test_recurrent_modules_in_two_threads(kind, options, scope):
    """Have the outputs of one thread, wherever the other one's call begins and ends."""
    module, x = recurrent(kind, options)
    with torch.no_grad():
        with Watching(lambda call: None) as watching:
            expected = module(x)[0]
        dense = dst_kernels.finalize_(copy.deepcopy(module))
        torch.testing.assert_close(dense(x)[0], expected, rtol=1e-12, atol=1e-12)

    def called(module, pause, at):
        with scope(), Watching(lambda call: pause() if call == at else None):
            return module(x)[0].clone()

    for at in range(1, watching.calls + 1, 2):
        module, _ = recurrent(kind, options)
        one = Overlapping(lambda pause, module=module: called(module, pause, watching.calls))
        other = Overlapping(lambda pause, module=module, at=at: called(module, pause, at))
        outputs = one.result(), other.result()
        assert all(torch.equal(output, expected) for output in outputs), f"paused at call {at}"


@every_recurrent_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_call_keeps_nothing_on_a_recurrent_module(kind, options, training):
    """So that another thread, a copy or a hook never sees masked weights in its place."""
    module, x = recurrent(kind, options)
    module.train(training)

    def seen():
        attributes = {name: id(value) for name, value in vars(module).items()}
        return attributes, list(map(id, module._flat_weights))

    module(x)
    before, seen_within = seen(), []
    with Watching(lambda call: seen_within.append(seen())):
        module(x)
    assert seen_within
    for each in seen_within:
        assert each == before
