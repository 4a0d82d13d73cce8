"""`plan_sparsify` changes nothing, `sparsify_` does what it says, and twice is once; the config."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dst_kernels import SparsifyConfig, plan_sparsify, sparsify_


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Flatten(),
        nn.Sequential(nn.Linear(8, 8), nn.Embedding(2, 2), nn.MultiheadAttention(4, 2)),
        nn.Linear(8, 2),
    )


def snapshot(model):
    return {name: (id(module), dict(vars(module))) for name, module in model.named_modules()}


def test_planning_changes_nothing():
    model = build()
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    for config in (None, SparsifyConfig.careful(min_numel=0)):
        plan_sparsify(model, config, lambda module, name: True)
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, (identity, attributes) in before.items():
        assert after[name][0] == identity and after[name][1].keys() == attributes.keys()
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    "config", [None, SparsifyConfig(skip_first=True), SparsifyConfig.careful()]
)
def test_the_plan_is_what_happens(config):
    model = build()
    plan = plan_sparsify(model, config)
    sparsify_(model, config)
    again = plan_sparsify(model, config)
    assert again.named("masked") == plan.named("convert")
    assert not again.named("convert") or config is not None
    assert {layer.name: layer.shape for layer in plan.layers} == {
        layer.name: layer.shape for layer in again.layers
    }
    skipped = {layer.name: layer.reason for layer in plan.layers if layer.action == "skip"}
    assert "2.1" in skipped


@pytest.mark.parametrize(
    "config", [None, SparsifyConfig(skip_first=True, skip_last=True), SparsifyConfig.careful()]
)
def test_a_second_call_changes_nothing(config):
    model = sparsify_(build(), config)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("threshold"):
                parameter.fill_(0.25)
    plan = plan_sparsify(model, config)
    assert sparsify_(model, config) is model
    assert plan_sparsify(model, config) == plan and plan.named("convert") == []
    for name, module in model.named_modules():
        assert modules[name] is module
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameters[name] is parameter
        if name.endswith("threshold"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.25))


def test_another_config_leaves_masked_layers_as_they_are():
    model = sparsify_(build(), filter_fn=lambda module, name: name == "3")
    first = model[3]
    sparsify_(model, SparsifyConfig(granularity="layer"))
    assert model[3] is first and first.granularity == "row"
    assert model[0].granularity == "layer"


def test_the_plan_prints_a_table():
    text = str(plan_sparsify(build(), SparsifyConfig(skip_first=True)))
    lines = text.splitlines()
    assert len(lines) == len(plan_sparsify(build()).layers) + 1
    assert lines[0].split() == ["skip", "0", "Conv2d", "8x3x3x3", "skip_first"]
    assert "3" in lines[-2] and "2x8" in lines[-2]
    assert (
        lines[-1] == "4 layers to convert, 0 masked already, 2 skipped; 39.6% of all weights masked"
    )
    assert plan_sparsify(build()).summary().startswith("5 layers to convert, 0 masked already")
    assert str(plan_sparsify(nn.ReLU())) == "0 layers to convert, 0 masked already, 0 skipped"
    assert "(root)" in str(plan_sparsify(nn.Linear(2, 2)))


def test_a_layer_that_starts_at_zero_is_pointed_out(caplog):
    """Heads of some models do, and would never learn: a pruned 0 gets no gradient."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight)
    reasons = [layer.reason for layer in plan_sparsify(model).layers]
    assert reasons[0] == "" and "all its weights are 0" in reasons[1]
    sparsify_(model)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("2 (Linear): all its weights are 0")
    model(torch.ones(1, 4)).sum().backward()
    assert not model[2].weight.grad.any()


def test_weights_without_values_are_not_pointed_out(caplog):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    sparsify_(model)
    with FakeTensorMode():
        sparsify_(nn.Sequential(nn.Linear(4, 3)))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_presets():
    assert SparsifyConfig.paper() == SparsifyConfig()
    careful = SparsifyConfig.careful()
    assert careful.skip_first and careful.skip_last and careful.skip_depthwise
    assert careful.min_numel == 1024 and careful.granularity == "row"
    changed = SparsifyConfig.careful(skip_last=False, granularity="layer")
    assert not changed.skip_last and changed.skip_first and changed.granularity == "layer"
    assert SparsifyConfig.paper(min_numel=3).min_numel == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        careful.min_numel = 0
    with pytest.raises(TypeError):
        SparsifyConfig("layer")


@pytest.mark.parametrize(
    "config",
    [
        SparsifyConfig(),
        SparsifyConfig.careful(),
        SparsifyConfig(
            granularity="element",
            reset_ratio=None,
            surrogate="triangular",
            structure_gradient=False,
        ),
    ],
)
def test_config_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert SparsifyConfig.from_dict(values) == config
    assert set(values) == {field.name for field in dataclasses.fields(SparsifyConfig)}


def test_config_from_a_part_and_from_unknown_keys():
    assert SparsifyConfig.from_dict({"min_numel": 7}) == SparsifyConfig(min_numel=7)
    with pytest.raises(ValueError, match="alpha, gamma"):
        SparsifyConfig.from_dict({"gamma": 1, "min_numel": 7, "alpha": 2})


@pytest.mark.parametrize(
    "option, value",
    [
        ("granularity", "column"),
        ("surrogate", "relu"),
        ("backend", "tpu"),
        ("reset_ratio", 2.0),
        ("reset_ratio", -0.5),
        ("min_numel", -1),
    ],
)
def test_bad_config_values(option, value):
    with pytest.raises(ValueError, match=option):
        SparsifyConfig(**{option: value})
    with pytest.raises(ValueError, match=option):
        SparsifyConfig.from_dict({option: value})


@pytest.mark.parametrize(
    "zeros, message",
    [
        (slice(0, 2), "50% of its weights are 0 (2 of 4 rows entirely)"),
        ((slice(None), 0), "25% of its weights are 0, and a pruned 0"),
        (slice(0, 0), ""),
    ],
)
def test_weights_that_start_at_zero_are_counted(zeros, message):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[zeros] = 0
    reason = plan_sparsify(layer).layers[0].reason
    assert message in reason and bool(reason) == bool(message)


def test_a_conversion_that_masks_little_warns_with_the_reasons(caplog):
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    plan = plan_sparsify(model)
    assert (plan.masked, plan.total) == (64, 864) and plan.share() == 64 / 864
    sparsify_(model)
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert record.getMessage().startswith("sparsify_: 7.4 % of all weights are masked (is an embed")
    caplog.clear()
    sparsify_(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_a_wrapped_model_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        for each in (model, nn.Sequential(model)):
            with pytest.raises(ValueError, match=r"DistributedDataParallel.*before wrapping it$"):
                sparsify_(each)
        assert type(model.module) is nn.Linear
    finally:
        torch.distributed.destroy_process_group()
