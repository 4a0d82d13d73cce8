"""Modules that stand in several places, and weights that several layers share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.nn import MaskedLinear
from tests.ops import authors


class Tied(nn.Module):
    """Two linear layers with one weight and biases of their own, and a third layer."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.last = nn.Linear(width, 2)

    def forward(self, input):
        return self.last(self.second(self.first(input).relu()).relu())


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return dst_kernels.sparsify_(Tied())


def test_a_module_in_two_places_is_converted_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(3, 3)}
    )
    model["b"].add_module("again", shared)
    assert dst_kernels.plan_sparsify(model).named("convert") == ["a", "c"]
    dst_kernels.sparsify_(model)
    assert type(model["a"]) is MaskedLinear and model["c"] is not model["a"]
    assert model["b"][1] is model["a"] and model["b"].again is model["a"]
    assert len(list(model.parameters())) == 6
    dst_kernels.finalize_(model)
    assert type(model["a"]) is nn.Linear
    assert model["b"][1] is model["a"] and model["b"].again is model["a"]


def test_a_shared_weight_gets_one_threshold(tied):
    assert tied.first is not tied.second
    assert tied.first.weight is tied.second.weight
    assert tied.first.threshold is tied.second.threshold
    assert tied.first.threshold is not tied.last.threshold
    names = [name for name, _ in tied.named_parameters()]
    assert names.count("first.threshold") == 1 and "second.threshold" not in names


def test_both_uses_give_gradients_to_the_one_threshold(tied):
    tied.first.reset_threshold(0.2)
    untied = copy.deepcopy(tied)
    second = MaskedLinear(6, 6)
    second.load_state_dict(untied.second.state_dict())
    untied.second = second
    input = torch.randn(5, 6)
    for model in (tied, untied):
        model(input).square().sum().backward()
    expected = untied.first.threshold.grad + untied.second.threshold.grad
    torch.testing.assert_close(tied.first.threshold.grad, expected)


def test_counted_once(tied):
    with torch.no_grad():
        tied.first.threshold.copy_(tied.first.weight.abs().median(1).values)
        tied.last.threshold.fill_(-1.0)
    kept = tied.first.mask().sum().item() + 12
    report = dst_kernels.sparsity_report(tied)
    assert [layer.name for layer in report.layers] == ["first", "second", "last"]
    assert (report.kept, report.total) == (kept, 36 + 12)
    assert report.remaining_ratio == kept / 48
    assert dst_kernels.remaining_ratio(tied).item() == pytest.approx(kept / 48, rel=1e-6)
    expected = authors.regularizer([tied.first.threshold, tied.last.threshold])
    torch.testing.assert_close(dst_kernels.sparse_regularization(tied), expected)
    groups = dst_kernels.parameter_groups(tied)
    thresholds = groups[1]["params"]
    assert len(thresholds) == 2 and thresholds[0] is tied.first.threshold
    assert thresholds[1] is tied.last.threshold
    assert len({id(p) for group in groups for p in group["params"]}) == 7


def test_finalize_keeps_them_shared(tied):
    with torch.no_grad():
        tied.first.threshold.copy_(tied.first.weight.abs().median(1).values)
    tied.eval()
    input = torch.randn(5, 6)
    expected, mask = tied(input), tied.first.mask()
    dst_kernels.finalize_(tied)
    assert type(tied.first) is type(tied.second) is nn.Linear and tied.first is not tied.second
    assert tied.first.weight is tied.second.weight
    assert torch.equal(tied.first.weight != 0, mask)
    assert torch.equal(tied(input), expected)


def test_a_weight_shared_with_a_layer_masked_earlier():
    """Converting in two steps ends where converting in one does."""
    model = Tied()
    dst_kernels.sparsify_(model, filter_fn=lambda module, name: name == "last")
    assert type(model.first) is nn.Linear
    partly = nn.Sequential(model, nn.Linear(2, 2))
    dst_kernels.sparsify_(partly)
    assert model.first.threshold is model.second.threshold


def test_a_new_dense_layer_on_a_masked_weight_takes_its_threshold(tied):
    late = nn.Linear(6, 6)
    late.weight = tied.first.weight
    tied.first.reset_threshold(0.5)
    model = nn.Sequential(tied, late)
    dst_kernels.sparsify_(model)
    assert model[1].threshold is tied.first.threshold
    assert torch.equal(model[1].threshold, torch.full((6,), 0.5))


def test_all_or_none_of_those_who_share_a_weight():
    model = Tied()
    plan = dst_kernels.plan_sparsify(model, filter_fn=lambda module, name: name != "second")
    assert plan.named("convert") == ["last"]
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["second"] == "filter_fn"
    assert "shares its weight with second" in reasons["first"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_head_tied_to_the_embedding_stays_dense(embedding_first):
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    parts = {"embedding": embedding, "body": nn.Linear(4, 4), "head": head}
    names = list(parts) if embedding_first else list(reversed(parts))
    model = nn.ModuleDict({name: parts[name] for name in names})
    plan = dst_kernels.plan_sparsify(model)
    assert plan.named("convert") == ["body"]
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "shares its weight with embedding" in reasons["head"]
    dst_kernels.sparsify_(model)
    assert model["head"] is head and model["embedding"].weight is model["head"].weight


def test_deepcopy_and_conversions_keep_the_sharing(tied):
    for model in (copy.deepcopy(tied), copy.deepcopy(tied).half(), copy.deepcopy(tied).double()):
        assert model.first.weight is model.second.weight
        assert model.first.threshold is model.second.threshold
        assert model.first.threshold is not tied.first.threshold


def test_training_with_a_shared_weight_commits_one_reset(tied):
    tied.first.reset_threshold(10.0)
    tied(torch.randn(3, 6)).sum().backward()
    assert torch.count_nonzero(tied.second.threshold) == 0
    assert tied.first.threshold.grad is not None


def test_shared_biases_stay_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    dst_kernels.sparsify_(model)
    assert model[0].bias is model[1].bias and model[0].threshold is not model[1].threshold
    dst_kernels.finalize_(model)
    assert model[0].bias is model[1].bias


@pytest.mark.parametrize("channels", [(4, 6), (5, 5)])
@pytest.mark.parametrize("first", ["encoder", "decoder"])
def test_a_decoder_tied_to_its_encoder_stays_dense(channels, first):
    """One threshold cannot govern the rows of both: they lie along different dimensions."""
    inputs, outputs = channels
    encoder, decoder = nn.Conv2d(inputs, outputs, 3), nn.ConvTranspose2d(outputs, inputs, 3)
    decoder.weight = encoder.weight
    layers = {"encoder": encoder, "decoder": decoder}
    order = [first, *layers.keys() - {first}]
    model = nn.ModuleDict({name: layers[name] for name in order})
    plan = dst_kernels.plan_sparsify(model)
    assert plan.named("convert") == []
    assert all("rows lie elsewhere" in layer.reason for layer in plan.layers)
    whole = dst_kernels.SparsifyConfig(granularity="layer")
    assert dst_kernels.plan_sparsify(model, whole).named("convert") == order
    model = dst_kernels.sparsify_(model, whole)
    hidden = model["encoder"](torch.randn(1, inputs, 5, 5))
    assert model["decoder"](hidden).shape == (1, inputs, 5, 5)


def test_weights_that_a_parametrization_computes_are_told_apart():
    # Each read makes a new tensor, often where the last one was: its address says nothing.
    model = nn.Sequential(
        *(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)) for _ in range(4))
    )
    dst_kernels.sparsify_(model)
    assert len({id(layer.threshold) for layer in model}) == 4
    report = dst_kernels.sparsity_report(model)
    assert (report.kept, report.total) == (64, 64)
    with torch.no_grad():
        model[3].threshold[:2] = 9
    assert dst_kernels.remaining_ratio(model) == 56 / 64
    dst_kernels.finalize_(model)
    assert [type(layer) for layer in model] == [nn.Linear] * 4
    assert [int((layer.weight != 0).sum()) for layer in model] == [16, 16, 16, 8]
