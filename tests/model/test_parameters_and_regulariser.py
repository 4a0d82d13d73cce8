"""`sparse_regularization(model)` and `parameter_groups(model)`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import masked_layers

import dst_kernels
from dst_kernels import parameter_groups, sparse_regularization, sparsify_
from tests.ops import authors


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Linear(2, 2))
    sparsify_(model, filter_fn=lambda module, name: name != "3")
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.threshold.uniform_(-2, 3)
    return model


def test_regulariser_value_and_gradient(model):
    value = sparse_regularization(model)
    thresholds = [layer.threshold for layer in masked_layers(model).values()]
    expected = authors.regularizer(thresholds)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    (0.5 * value).backward()
    for threshold in thresholds:
        torch.testing.assert_close(threshold.grad, -0.5 * (-threshold.detach()).exp())
    assert model[0].weight.grad is None


def test_regulariser_counts_every_threshold_element():
    for granularity, count in (("row", 4), ("layer", 1), ("element", 12)):
        config = dst_kernels.SparsifyConfig(granularity=granularity)
        assert sparse_regularization(sparsify_(nn.Linear(3, 4), config)).item() == count


def test_regulariser_of_mixed_precisions():
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 2).bfloat16())
    assert sparse_regularization(sparsify_(model)).item() == 6


def test_regulariser_never_overflows(model):
    for layer in masked_layers(model).values():
        layer.reset_threshold(-100.0)
    value = sparse_regularization(model)
    value.backward()
    assert torch.isfinite(value)
    for layer in masked_layers(model).values():
        assert torch.isfinite(layer.threshold.grad).all() and (layer.threshold.grad < 0).all()


def test_groups_cover_every_parameter_once(model):
    weights, thresholds = parameter_groups(model)
    assert weights["name"] == "weights" and thresholds["name"] == "thresholds"
    assert [id(p) for p in thresholds["params"]] == [
        id(layer.threshold) for layer in masked_layers(model).values()
    ]
    covered = [id(p) for group in (weights, thresholds) for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    assert len(set(covered)) == len(covered)


def test_defaults_leave_the_optimizers_own_values(model):
    weights, thresholds = parameter_groups(model)
    assert set(weights) == {"name", "params"}
    assert set(thresholds) == {"name", "params", "weight_decay"}
    assert thresholds["weight_decay"] == 0.0
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.3, weight_decay=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "thresholds"]


def test_given_values(model):
    weights, thresholds = parameter_groups(model, lr=0.1, weight_decay=0.01)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (thresholds["lr"], thresholds["weight_decay"]) == (0.1, 0.0)
    weights, thresholds = parameter_groups(
        model, lr=0.1, weight_decay=0.01, threshold_lr=0.5, threshold_weight_decay=0.001
    )
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (thresholds["lr"], thresholds["weight_decay"]) == (0.5, 0.001)
    weights, thresholds = parameter_groups(model, threshold_lr=0.0)
    assert "lr" not in weights and thresholds["lr"] == 0.0


def test_frozen_parameters_are_left_out(model):
    model[0].weight.requires_grad_(False)
    model[2].threshold.requires_grad_(False)
    weights, thresholds = parameter_groups(model)
    assert not any(p is model[0].weight for p in weights["params"])
    assert [id(p) for p in thresholds["params"]] == [id(model[0].threshold)]
    model[0].threshold.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model)] == ["weights"]
    model.requires_grad_(False)
    model[0].threshold.requires_grad_(True)
    assert [group["name"] for group in parameter_groups(model)] == ["thresholds"]
    model.requires_grad_(False)
    assert parameter_groups(model) == []


def test_an_optimizer_step_moves_thresholds_by_their_own_rate(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=0.0, threshold_lr=0.25)
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)
    sparse_regularization(model).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name.endswith("threshold"):
            expected = expected + 0.25 * (-expected).exp()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)
