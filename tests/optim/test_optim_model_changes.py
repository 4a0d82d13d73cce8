"""Models that are loaded, written to, converted, copied or handed on between deferred steps."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from networks import channels_last, linear
from torch import nn
from twins import Side, Twins, batches, masked_layers

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD, DSTAdamW
from tests.ops import authors

OPTIONS = {"lr": 0.1, "momentum": 0.9, "alpha": 0.05}


@pytest.fixture
def backend(best_backend):
    return best_backend


def trained(backend, network=linear, steps=4, **options):
    model, shape = network(backend=backend)
    twins = Twins(model, backend=backend, **{**OPTIONS, **options})
    data = batches(shape)
    twins.train(data, steps)
    return twins, data


@pytest.fixture
def collect_garbage():
    """Of this test; the many objects from before need no look."""
    gc.collect(0)
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


def go_on(twins, data):
    """The next forward must not use what the last step has packed."""
    twins.train(data, 4)
    twins.assert_same(data[0][0])


# -- writes ------------------------------------------------------------------------------------


def test_a_state_dict_loaded_in_mid_training(backend):
    twins, data = trained(backend)
    earlier = copy.deepcopy(twins.theirs.model.state_dict())
    twins.train(data, 5)
    twins.on_models(lambda model: model.load_state_dict(earlier))
    go_on(twins, data)


def test_a_state_dict_assigned_in_mid_training(backend):
    """The parameters themselves are others then, so both optimizers keep the old ones."""
    twins, data = trained(backend)
    copies = twins.both(lambda side: copy.deepcopy(side.model.state_dict()))
    for side, state in zip(twins.sides, copies, strict=True):
        side.model.load_state_dict({k: v * 0.5 for k, v in state.items()}, assign=True)
    output = twins.both(lambda side: side.model(data[0][0]))
    torch.testing.assert_close(*output, rtol=1e-12, atol=1e-12)


WRITES = {
    "in place": lambda p: p.mul_(0.5),
    "a part": lambda p: p[0].fill_(0.3),
    "copied": lambda p: p.copy_(torch.full_like(p, 0.2)),
    "data assigned": lambda p: setattr(p, "data", p.data * 0.5),
    "set_": lambda p: p.set_((p * 0.5).contiguous()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("name", ["weight", "threshold"])
def test_writes_between_steps(name, write, backend):
    twins, data = trained(backend)
    twins.on_models(lambda model: write(getattr(masked_layers(model)[1], name)))
    go_on(twins, data)


def test_swapped_weights(backend):
    """As when an average of the weights is evaluated for a while."""
    twins, data = trained(backend)
    kept = twins.both(lambda side: side.model[0].weight.data)
    for side, weight in zip(twins.sides, kept, strict=True):
        side.model[0].weight.data = weight * 0.5
    outputs = twins.both(lambda side: side.model.eval()(data[0][0]))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for side, weight in zip(twins.sides, kept, strict=True):
        side.model[0].weight.data = weight
        side.model.train()
    go_on(twins, data)


@pytest.mark.parametrize("option", ["surrogate", "structure_gradient", "reset_ratio"])
def test_options_of_a_layer_changed_between_steps(option, backend):
    twins, data = trained(backend)
    value = {"surrogate": "triangular", "structure_gradient": False, "reset_ratio": None}[option]
    for side in twins.sides:
        setattr(masked_layers(side.model)[1], option, value)
    twins.on_models(lambda model: masked_layers(model)[1].reset_threshold(0.5))
    go_on(twins, data)


def test_a_guard_switched_on_between_steps(backend):
    """What the last step has packed is all 0, and nothing but the ratio changes."""
    twins, data = trained(backend)
    for ratio in (None, 0.01):
        for side in twins.sides:
            masked_layers(side.model)[1].reset_ratio = ratio
        if ratio is None:
            twins.on_models(lambda model: masked_layers(model)[1].reset_threshold(30.0))
        go_on(twins, data)
        for side in twins.sides:
            assert bool((masked_layers(side.model)[1].threshold > 20).all()) == (ratio is None)


# -- conversions -------------------------------------------------------------------------------


def test_to_double_in_mid_training(backend):
    """State follows; torch's own keeps the dtype it was made with, and with it the rounding."""
    torch.manual_seed(1)
    model, shape = linear(backend=backend)
    optimizer = DSTSGD(model.float(), backend=backend, **OPTIONS)
    input, target = batches(shape)[0]
    nn.functional.cross_entropy(model(input.float()), target).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.double()
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(dst_kernels.parameter_groups(twin), lr=0.1, momentum=0.9)
    state = optimizer.state_dict()["state"]
    plain.load_state_dict({**plain.state_dict(), "state": copy.deepcopy(state)})
    twins = Twins.__new__(Twins)
    twins.ours, twins.theirs = Side(model, optimizer, False), Side(twin, plain, True)
    twins.sides, twins.alpha_in_loss, twins.resets = (twins.ours, twins.theirs), False, 0
    go_on(twins, batches(shape))
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float64


def test_to_channels_last_and_back(backend):
    twins, data = trained(backend, channels_last)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twins.both(lambda side, m=memory_format: side.model.to(memory_format=m))
        go_on(twins, data)


# -- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_have_gradients_of_their_own(how, backend):
    """Even copies of 16-bit G's layers; and the original keeps its optimizer."""
    layer = MaskedLinear(6, 4, backend=backend)
    optimizer = DSTSGD(layer, backend=backend, **OPTIONS)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.randn(3, 6)).float().square().sum()
        loss.backward()
        copied = how(layer)
        assert copied._deferral is None
        with torch.autocast("cpu", torch.bfloat16):
            loss = copied(torch.randn(3, 6)).float().square().sum()
        loss.backward()
        assert copied.weight.grad.dtype == torch.float32
        assert copied.threshold.grad is not None and layer.threshold.grad is None, step
        optimizer.step()
        optimizer.zero_grad()
    DSTSGD(copied, lr=0.1)


# -- the end of an optimizer -------------------------------------------------------------------


def ends(optimizer, how):
    if how == "release":
        optimizer.release()
        optimizer.release()  # once is enough, twice does no harm


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["release", "del"])
def test_the_end_gives_gradients_back(how, autocast, backend, collect_garbage):
    model, shape = linear(backend=backend)
    model.float()
    twin = copy.deepcopy(model)
    optimizer = DSTSGD(model, lr=0.0, backend=backend)
    input, target = batches(shape, dtype=torch.float32)[0]

    def backward(of):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = of(input)
        nn.functional.cross_entropy(output.float(), target).backward()

    backward(model)
    optimizer.step()
    ends(optimizer, how)
    del optimizer
    collect_garbage()
    for layer in masked_layers(model):
        assert layer._deferral is None and layer.weight.grad is None, "a raw G was left"
    model.zero_grad()
    dst_kernels.group_(twin)
    backward(model)
    backward(twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad)


def test_torch_goes_on_where_ours_ended(backend):
    """With its state, too."""
    twins, data = trained(backend)
    ours = twins.ours
    plain = torch.optim.SGD(dst_kernels.parameter_groups(ours.model), lr=0.1)
    plain.load_state_dict(ours.optimizer.state_dict())
    ours.optimizer.release()
    ours.optimizer, ours.in_loss = plain, True
    alphas = [0.05, 0.05]
    for input, target in data:
        for side in twins.sides:
            side.optimizer.zero_grad()
            (side.loss(input, target) + side.regularizer(alphas)).backward()
            side.optimizer.step()
    twins.assert_same(data[0][0])


def test_a_released_optimizer_is_a_plain_one(backend):
    twins, data = trained(backend)
    twins.ours.optimizer.release()
    go_on(twins, data)
    assert all(layer.threshold.grad is not None for layer in masked_layers(twins.ours.model))


def test_a_layer_that_becomes_dense_trains_on(backend):
    twins, data = trained(backend)
    twins.on_models(lambda model: dst_kernels.densify_(masked_layers(model)[0]))
    go_on(twins, data)
    assert len(masked_layers(twins.ours.model)) == 2


def test_a_second_optimizer_is_refused_and_changes_nothing(backend):
    twins, data = trained(backend)
    for second in (DSTSGD, DSTAdamW):
        with pytest.raises(ValueError, match=r"model: 3 of its layers belong .* release\(\) first"):
            second(twins.ours.model, backend=backend)
    go_on(twins, data)
    twins.ours.optimizer.release()
    DSTAdamW(twins.ours.model, backend=backend)


def test_one_optimizer_after_another(backend, collect_garbage):
    """With a new rule, and after a constructor that failed."""
    model, shape = linear(backend=backend)
    with pytest.raises(ValueError, match="bucket_mb") as kept_alive:
        DSTSGD(model, bucket_mb=-1)
    optimizer = DSTSGD(model, backend=backend, **OPTIONS)
    del optimizer
    collect_garbage()
    twins = Twins(model, "adamw", lr=0.02, backend=backend)
    go_on(twins, batches(shape))
    assert kept_alive


def test_two_optimizers_for_halves_of_a_model(backend):
    """Each has its layers; the model is called as a whole."""
    model, shape = linear(backend=backend)
    twin = copy.deepcopy(model)
    halves = [list(m.parameters()) for m in (model[:1], model[1:])]
    deferred = [DSTSGD(model, half, backend=backend, lr=0.1) for half in halves[:1]]
    deferred.append(DSTAdamW(model[1:], halves[1], backend=backend, lr=0.02, alpha=0.1))
    halves = [list(m.parameters()) for m in (twin[:1], twin[1:])]
    plain = [torch.optim.SGD(halves[0], lr=0.1), torch.optim.AdamW(halves[1], lr=0.02)]
    for input, target in batches(shape) * 2:
        for each, optimizers in ((model, deferred), (twin, plain)):
            loss = nn.functional.cross_entropy(each(input), target)
            if each is twin:
                loss = loss + 0.1 * authors.regularizer([twin[2].threshold, twin[4].threshold])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(model(input), twin(input), rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
