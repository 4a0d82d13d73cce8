"""State dicts: the parent's keys plus `threshold`, and dense checkpoints that load strictly."""

from __future__ import annotations

import logging

import pytest
import torch
from layer_cases import CASES, GRANULARITIES, every_granularity, every_layer
from torch import nn

from dst_kernels.nn import MaskedConv2d, MaskedLayer, MaskedLinear

FINE = 1 + 2**-20  # rounds to 1 in 16 bits


def masked_model(device=None, dtype=None, **options):
    kwargs = {"device": device, "dtype": dtype, **options}
    return nn.Sequential(
        MaskedConv2d(3, 4, 3, **kwargs),
        nn.Flatten(),
        nn.ModuleDict({"a": MaskedLinear(4, 5, **kwargs), "b": nn.Linear(5, 2)}),
        MaskedLinear(5, 2, bias=False, **kwargs),
    )


def dense_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 2)}),
        nn.Linear(5, 2, bias=False),
    )


def masked_layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def set_thresholds(model, value):
    for layer in masked_layers(model):
        layer.reset_threshold(value)


def lines_about_thresholds(caplog):
    records = [r for r in caplog.records if r.name.startswith("dst_kernels")]
    assert all(r.levelno == logging.WARNING for r in records)
    return [r.getMessage() for r in records if "threshold" in r.getMessage()]


def test_keys():
    for case in CASES:
        masked, dense = case.masked(*case.args), case.dense(*case.args)
        assert list(masked.state_dict()) == [*dense.state_dict(), "threshold"]
        assert [n for n, _ in masked.named_parameters()] == ["weight", "bias", "threshold"]
        assert not list(masked.named_buffers())


@every_layer
def test_masked_checkpoint_round_trip(case):
    for granularity in GRANULARITIES:
        saved, loaded = (case.masked(*case.args, granularity=granularity) for _ in range(2))
        nn.init.uniform_(saved.threshold)
        loaded.load_state_dict(saved.state_dict(), strict=True)
        for name, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_dense_checkpoint_loads_strictly(caplog, assign):
    dense, model = dense_model(), masked_model()
    set_thresholds(model, 0.5)
    state = dense.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with caplog.at_level(logging.DEBUG):
        result = model.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert len(lines_about_thresholds(caplog)) == 1
    assert list(state) == list(before), "the caller's state dict is the caller's"
    for name, value in before.items():
        assert torch.equal(state[name], value)
        assert torch.equal(model.state_dict()[name], value)
    for layer in masked_layers(model):
        assert isinstance(layer.threshold, nn.Parameter) and layer.threshold.requires_grad
        assert torch.equal(layer.threshold, torch.zeros(layer.weight.shape[0]))


def test_one_line_per_load(caplog):
    model, state = masked_model(), dense_model().state_dict()
    for loads in (1, 2, 3):
        model.load_state_dict(state)
        assert len(lines_about_thresholds(caplog)) == loads


def test_no_line_for_a_masked_checkpoint(caplog):
    model = masked_model()
    with caplog.at_level(logging.DEBUG):
        model.load_state_dict(masked_model().state_dict())
    assert not lines_about_thresholds(caplog)


@every_granularity
def test_dense_checkpoint_onto_meta(granularity):
    model, state = masked_model(device="meta", granularity=granularity), dense_model().state_dict()
    model[2]["b"].to("meta")
    model.load_state_dict(state, strict=True, assign=True)
    for layer in masked_layers(model):
        assert layer.threshold.device.type == "cpu" and layer.threshold.dtype == torch.float32
        assert torch.count_nonzero(layer.threshold) == 0
        assert torch.isfinite(layer.weight).all()
    assert model[0](torch.randn(1, 3, 3, 3)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_sixteen_bit_threshold_in_the_checkpoint_comes_out_fp32(dtype, assign):
    source = masked_model()
    set_thresholds(source, 0.125)
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    model = masked_model(dtype=dtype)
    model.load_state_dict(state, assign=assign)
    for layer in masked_layers(model):
        assert layer.weight.dtype == dtype and layer.threshold.dtype == torch.float32
        assert torch.equal(layer.threshold, torch.full_like(layer.threshold, 0.125))
    assert all(value.dtype == dtype for value in state.values())


def test_assigned_fp32_threshold_beside_sixteen_bit_weights():
    source = masked_model(dtype=torch.bfloat16)
    set_thresholds(source, FINE)
    model = masked_model(device="meta", dtype=torch.bfloat16)
    model[2]["b"] = nn.Linear(5, 2)
    model.load_state_dict(source.state_dict(), assign=True)
    for layer in masked_layers(model):
        assert layer.threshold.dtype == torch.float32
        assert torch.equal(layer.threshold, torch.full_like(layer.threshold, FINE))


def test_dense_double_checkpoint_assigned_to_a_meta_model_gets_double_thresholds():
    model = MaskedLinear(3, 2, device="meta")
    model.load_state_dict(nn.Linear(3, 2).double().state_dict(), assign=True)
    assert model.weight.dtype == model.threshold.dtype == torch.float64


def test_strict_still_reports_what_else_is_wrong():
    state = dense_model().state_dict()
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        masked_model().load_state_dict(state)
    state = {**dense_model().state_dict(), "0.mask": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"0\.mask"):
        masked_model().load_state_dict(state)
    state = {**masked_model().state_dict(), "3.threshold": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"3\.threshold"):
        masked_model().load_state_dict(state)


def test_a_masked_layer_without_weights_in_the_checkpoint_reports_both():
    result = MaskedLinear(3, 2).load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == ["bias", "threshold", "weight"]


def test_keys_of_a_partial_state_dict_keep_trained_thresholds():
    """Only a checkpoint that has the weight and no threshold is a dense one."""
    layer = MaskedLinear(3, 2)
    layer.reset_threshold(0.5)
    layer.load_state_dict({"bias": torch.ones(2)}, strict=False)
    assert torch.equal(layer.threshold, torch.full((2,), 0.5))


def test_load_state_dict_keeps_the_parameter_object():
    layer = MaskedLinear(3, 2)
    threshold = layer.threshold
    layer.load_state_dict(nn.Linear(3, 2).state_dict())
    assert layer.threshold is threshold, "optimizers hold this object"
