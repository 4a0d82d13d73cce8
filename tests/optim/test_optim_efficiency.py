"""What a step costs besides its arithmetic, as far as it can be counted without a GPU."""

from __future__ import annotations

import pytest
import torch
from networks import channels_last, linear, other_granularities, with_dense_layers
from torch.utils._python_dispatch import TorchDispatchMode
from twins import RULES, Twins, batches, masked_layers

from dst_kernels.nn.sources import deferred as source
from dst_kernels.nn.sources import grouped as group
from dst_kernels.optim import deferred

WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy_to_cpu"}
OPTIONS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "alpha": 0.05},
    "adamw": {"lr": 0.01, "alpha": 0.05},
}


class Calls(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch):
    """`count(module, name)` is a list that gets an entry at each call of that function."""

    def counting(module, name):
        calls, function = [], getattr(module, name)

        def counted(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        return calls

    return counting


def make(network, rule, backend, **options):
    model, shape = network(backend=backend)
    return Twins(model, rule, backend=backend, **{**OPTIONS[rule], **options}), batches(shape)


@pytest.mark.parametrize("network", [linear, with_dense_layers, other_granularities])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_does_not_wait_for_the_device(rule, network, backend):
    """Nor do the norm and clipping, or a step that gets its scale from a GradScaler."""
    twins, data = make(network, rule, backend)
    optimizer = twins.ours.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for i, (input, target) in enumerate(data):
        optimizer.zero_grad()
        loss = twins.ours.loss(input, target)
        (scaler.scale(loss) if i % 2 else loss).backward()
        with Calls() as calls:
            if i < 2:
                optimizer.clip_grad_norm_(1.0)
            optimizer.grad_scale = torch.ones(())
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        assert calls.names and not WAITING & set(calls.names)


@pytest.mark.parametrize("network", [linear, with_dense_layers, channels_last])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_compiled_step_is_one_call(rule, network, backend):
    """For all parameters; the tensor of hypers is made again only when they change."""
    twins, data = make(network, rule, backend)
    twins.train(data, 2)
    twins.backward(*data[1])
    with Calls() as calls:
        twins.ours.optimizer.step()
    found = [name for name in calls.names if "record_function" not in name]
    assert found == [{"sgd": "sgd_step", "adamw": "adamw_step"}[rule]]


@pytest.mark.parametrize("rule", RULES)
def test_lists_are_collected_once(rule, backend, count):
    """Again after first steps; not for other numbers, and not for a norm."""
    twins, data = make(with_dense_layers, rule, backend)
    collected = count(deferred, "collect")
    grouped = count(group.Group, "_new_buckets")
    optimizer = twins.ours.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for i in range(6):
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        twins.ours.loss(*data[i % 4]).backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        scheduler.step()
        optimizer.param_groups[1]["alpha"] *= 2
    assert len(collected) <= 2
    assert len(grouped) == 1


def test_lists_are_collected_anew_where_it_matters(backend, count):
    twins, data = make(linear, "sgd", backend)
    collected = count(deferred, "collect")
    twins.train(data, 3)
    layer = masked_layers(twins.ours.model)[0]
    for change in (
        lambda: layer.threshold.requires_grad_(False),
        lambda: setattr(layer.weight, "data", layer.weight.data.clone()),
        lambda: setattr(layer, "surrogate", "triangular"),
        lambda: twins.ours.optimizer.load_state_dict(twins.ours.optimizer.state_dict()),
        lambda: twins.ours.optimizer.state.clear(),
    ):
        change()
        collected.clear()
        twins.ours.optimizer.zero_grad()
        twins.ours.loss(*data[0]).backward()
        twins.ours.optimizer.step()
        assert len(collected) == 1


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_packed_by_the_step(rule, backend, count):
    """Only the first forward packs; its tensors are written to from then on."""
    twins, data = make(linear, rule, backend)
    packed = count(source, "pack_weights")
    twins.step(*data[0])
    deferral, layers = twins.ours.optimizer._deferral, masked_layers(twins.ours.model)
    first = deferral.fresh(layers)
    twins.train(data, 5)
    assert packed == ["pack_weights"]
    now = deferral.fresh(layers)
    assert all(now[layer] is first[layer] for layer in layers)
