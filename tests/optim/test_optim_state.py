"""The optimizer's own state: saved, loaded, exchanged with torch.optim, copied, refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from networks import channels_last, linear, other_granularities
from torch import nn
from twins import RULES, Twins, batches, without

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD, DSTAdamW

STEPS = 8
OPTIONS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "alpha": 0.05},
    "adamw": {"lr": 0.02, "alpha": 0.05},
}
every_rule = pytest.mark.parametrize("rule", RULES)
through_a_file = pytest.mark.parametrize("through_a_file", [False, True])


@pytest.fixture
def backend(best_backend):
    return best_backend


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(network, rule, backend, steps=STEPS, **options):
    model, shape = network(backend=backend)
    twins = Twins(model, rule, backend=backend, **{**OPTIONS[rule], **options})
    data = batches(shape)
    twins.train(data, steps)
    return twins, data


@every_rule
@through_a_file
@pytest.mark.parametrize("network", [linear, channels_last, other_granularities])
def test_goes_on_bit_for_bit(network, rule, through_a_file, backend):
    twins, data = trained(network, rule, backend)
    side = twins.ours
    model = network(backend=backend)[0]
    other = RULES[rule][0](model, backend=backend)
    states = [side.model.state_dict(), side.optimizer.state_dict()]
    states = saved(states) if through_a_file else copy.deepcopy(states)
    model.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert other.param_groups[1]["alpha"] == 0.05
    for input, target in data:
        for each, optimizer in ((side.model, side.optimizer), (model, other)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(input), target).backward()
            optimizer.step()
    for p, q in zip(side.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    mine, yours = (o.state_dict()["state"] for o in (side.optimizer, other))
    for index, state in mine.items():
        assert all(torch.equal(value, yours[index][key]) for key, value in state.items())


@every_rule
@through_a_file
def test_takes_the_state_of_torch(rule, through_a_file, backend):
    """In mid-training, into the optimizer of a model that then has the same parameters."""
    twins, data = trained(linear, rule, backend)
    theirs = twins.theirs
    fresh, _ = linear(backend=backend)
    continued = Twins(fresh, rule, backend=backend, alpha=0.05, lr=0.5)
    state = theirs.optimizer.state_dict()
    state = saved(state) if through_a_file else state
    continued.on_models(lambda model: model.load_state_dict(theirs.model.state_dict()))
    for side in continued.sides:
        side.optimizer.load_state_dict(copy.deepcopy(state))
    ours = continued.ours.optimizer.param_groups[1]
    assert ours["lr"] == OPTIONS[rule]["lr"] and ours["alpha"] == 0.05, "torch's has no alpha"
    continued.train(data, STEPS)
    continued.assert_same(data[0][0])


@every_rule
@through_a_file
def test_gives_its_state_to_torch(rule, through_a_file, backend):
    twins, data = trained(linear, rule, backend)
    state = twins.ours.optimizer.state_dict()
    model = copy.deepcopy(twins.ours.model)
    optimizer = RULES[rule][1](dst_kernels.parameter_groups(model), lr=0.5)
    optimizer.load_state_dict(saved(state) if through_a_file else copy.deepcopy(state))
    twins.theirs.model, twins.theirs.optimizer = model, optimizer
    twins.train(data, STEPS)
    twins.assert_same(data[0][0])


@every_rule
def test_back_and_forth(rule, backend):
    """Each takes what the other has saved, several times."""
    twins, data = trained(linear, rule, backend)
    for _ in range(3):
        mine, yours = twins.both(lambda side: copy.deepcopy(side.optimizer.state_dict()))
        twins.ours.optimizer.load_state_dict(yours)
        twins.theirs.optimizer.load_state_dict(mine)
        twins.train(data, 3)
        twins.assert_same(data[0][0])


def test_state_dicts_name_what_torch_names(backend):
    for rule in RULES:
        twins, _ = trained(linear, rule, backend, steps=1)
        mine, yours = twins.both(lambda side: side.optimizer.state_dict())
        shared = without(yours["param_groups"][0], ["foreach", "fused", "differentiable"])
        more = {"amsgrad", "decoupled_weight_decay"} if rule == "adamw" else set()
        assert shared.keys() - more <= mine["param_groups"][0].keys()
        assert mine["state"].keys() == yours["state"].keys()


@every_rule
def test_state_follows_the_memory_format(rule, backend):
    """Saved from contiguous weights, loaded beside channels last ones; and the model converted."""
    twins, data = trained(channels_last, rule, backend)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twins.both(lambda side, m=memory_format: side.model.to(memory_format=m))
        twins.train(data, 2)
        twins.assert_same(data[0][0])
    states = twins.both(lambda side: copy.deepcopy(side.optimizer.state_dict()))
    twins.both(lambda side: side.model.to(memory_format=torch.contiguous_format))
    for side, state in zip(twins.sides, states, strict=True):
        side.optimizer.load_state_dict(state)
    twins.train(data, 2)
    twins.assert_same(data[0][0])
    weight = twins.ours.model[0].weight
    for key in ("momentum_buffer",) if rule == "sgd" else ("exp_avg", "exp_avg_sq"):
        assert twins.ours.optimizer.state[weight][key].stride() == weight.stride()


@every_rule
def test_state_thrown_away_between_steps(rule, backend):
    """As some do at the start of an epoch."""
    twins, data = trained(linear, rule, backend)
    twins.both(lambda side: side.optimizer.state.clear())
    twins.train(data, 3)
    twins.assert_same(data[0][0])


@every_rule
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_train_on(rule, how, backend):
    twins, data = trained(linear, rule, backend)
    model, optimizer = twins.ours.model, twins.ours.optimizer
    twins.ours.model, twins.ours.optimizer = how((model, optimizer))
    assert twins.ours.optimizer.param_groups[0]["params"][0] is twins.ours.model[0].weight
    before = [p.detach().clone() for p in model.parameters()]
    twins.train(data, 3)
    twins.assert_same(data[0][0])
    assert all(map(torch.equal, before, model.parameters())), "the original was touched"
    optimizer.zero_grad()
    model(data[0][0]).sum().backward()
    assert model[0].threshold.grad is None, "the original has its optimizer still"


def test_a_pickled_optimizer_brings_its_model(backend):
    layer = MaskedLinear(4, 3, backend=backend)
    optimizer = pickle.loads(pickle.dumps(DSTSGD(layer, lr=0.1, alpha=0.1)))
    copied = optimizer._model
    assert copied is not layer
    copied(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert copied.threshold.grad is None and copied.threshold.any()


def refused(optimizer, other, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before), "half of it was loaded"


def test_states_of_other_rules_are_refused():
    layer = MaskedLinear(4, 3)
    optimizer = DSTAdamW(layer)

    def adam(**options):
        return torch.optim.Adam(dst_kernels.parameter_groups(layer), **options)

    refused(optimizer, adam(amsgrad=True), "amsgrad is not supported")
    refused(optimizer, adam(weight_decay=0.1), "decay is decoupled here .AdamW.*.Adam.")
    optimizer.load_state_dict(adam().state_dict())  # without decay they agree
    optimizer.release()
    one = torch.optim.SGD(layer.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        DSTSGD(layer).load_state_dict(one.state_dict())


def test_tensors_among_the_options_survive(backend):
    layer = MaskedLinear(4, 3, backend=backend)
    options = {"lr": torch.tensor(0.5), "alpha": torch.tensor(0.25)}
    optimizer = DSTSGD(layer, **options)
    state = saved(optimizer.state_dict())
    optimizer.release()
    other = DSTSGD(layer)
    other.load_state_dict(state)
    for group in other.param_groups:
        assert group["lr"] == 0.5 and group["alpha"] == 0.25
