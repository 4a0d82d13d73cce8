"""`sparsity_report` and `remaining_ratio` against counting by hand, and how often they wait."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from zoo import masked_layers

import dst_kernels
from dst_kernels import SparsifyConfig, sparsify_, sparsity_report


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(6, 6, 2, groups=6),
        nn.Conv3d(2, 5, 2),
        nn.ModuleDict({"head": nn.Linear(7, 5)}),
        nn.Linear(5, 3, bias=False),
        nn.BatchNorm1d(3),
    )
    sparsify_(model, SparsifyConfig(**options))
    with torch.no_grad():
        for layer in masked_layers(model).values():
            largest = float(layer.weight.abs().max())
            layer.threshold.uniform_(0, 1.1 * largest)
            layer.weight[1] = 0  # a dead row
            if layer.weight.shape[1] > 1:
                layer.weight[:, -1] = 0  # dead columns; with one channel a group the row was one
    return model


def by_hand(layer):
    """Count with Python loops over input channels; groups see their own part of the input."""
    weight = layer.weight.detach()
    threshold = layer.threshold.detach()
    if threshold.shape != weight.shape:
        threshold = threshold.reshape([-1] + [1] * (weight.dim() - 1)).expand_as(weight)
    mask = weight.abs() > threshold
    if layer.reset_ratio is not None and mask.sum() / mask.numel() <= layer.reset_ratio:
        threshold = torch.zeros_like(threshold)
        mask = weight != 0
    groups = getattr(layer, "groups", 1)
    per_group, rows_per_group = weight.shape[1], weight.shape[0] // groups
    dead_columns = sum(
        not mask[group * rows_per_group : (group + 1) * rows_per_group, column].any()
        for group in range(groups)
        for column in range(per_group)
    )
    dead_rows = sum(not row.any() for row in mask)
    return mask, threshold, dead_rows, dead_columns


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_every_layer_against_counting_by_hand(granularity):
    model = build(granularity=granularity)
    report = sparsity_report(model)
    layers = masked_layers(model)
    assert [entry.name for entry in report.layers] == list(layers) == ["0", "1", "2", "3.head", "4"]
    kept = total = 0
    for entry in report.layers:
        layer = layers[entry.name]
        mask, threshold, dead_rows, dead_columns = by_hand(layer)
        assert entry.shape == tuple(layer.weight.shape)
        assert (entry.kept, entry.total) == (mask.sum().item(), mask.numel())
        assert entry.remaining_ratio == entry.kept / entry.total
        assert (entry.dead_rows, entry.dead_columns) == (dead_rows, dead_columns)
        assert entry.dead_rows >= 1 and entry.dead_columns >= 1
        assert entry.threshold_min == threshold.min().item()
        assert entry.threshold_max == threshold.max().item()
        assert entry.threshold_mean == pytest.approx(threshold.double().mean().item(), rel=1e-5)
        assert torch.equal(layer.mask(), mask)
        kept, total = kept + entry.kept, total + entry.total
    assert 0 < kept < total
    assert (report.kept, report.total, report.remaining_ratio) == (kept, total, kept / total)
    ratio = dst_kernels.remaining_ratio(model)
    assert ratio.shape == () and ratio.dtype == torch.float32 and not ratio.requires_grad
    assert ratio.item() == pytest.approx(kept / total, rel=1e-6)


def test_a_dead_column_of_a_grouped_convolution_by_hand():
    """Two channels a group: weight[:3, 1] reads input channel 1, weight[3:, 0] channel 2."""
    layer = sparsify_(nn.Conv2d(4, 6, 1, groups=2))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:3, 1] = 0
    (entry,) = sparsity_report(layer).layers
    assert entry.dead_columns == 1 and entry.dead_rows == 0 and entry.kept == 9
    with torch.no_grad():
        layer.weight[3:, 0] = 0
        layer.weight[5] = 0
    (entry,) = sparsity_report(layer).layers
    assert entry.dead_columns == 2 and entry.dead_rows == 1 and entry.kept == 5


def test_transposed_convolutions_count_output_channels_as_rows():
    """Two groups of two inputs and three outputs: the second group's are 2, 3 and 3, 4, 5."""
    layer = sparsify_(nn.ConvTranspose2d(4, 6, 2, groups=2))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[2:, 1] = 0  # output channel 4
        layer.weight[3] = 0  # input channel 3
    (entry,) = sparsity_report(layer).layers
    assert entry.shape == (4, 3, 2, 2)
    assert (entry.dead_rows, entry.dead_columns, entry.kept) == (1, 1, 4 * (6 + 2))


def test_transposed_layers_count_output_neurons_as_rows():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = sparsify_(Conv1D(5, 3))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, [0, 4]] = 0  # two neurons
        layer.weight[2] = 0  # one input feature
    (entry,) = sparsity_report(layer).layers
    assert entry.shape == (3, 5) and entry.kept == 6
    assert (entry.dead_rows, entry.dead_columns) == (2, 1)


def test_the_guard_counts_and_nothing_is_written():
    model = build()
    for layer in masked_layers(model).values():
        layer.reset_threshold(10.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sparsity_report(model.train())
    assert all(entry.threshold_max == 0 and entry.kept > 0 for entry in report.layers)
    assert dst_kernels.remaining_ratio(model).item() == pytest.approx(report.remaining_ratio)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    unguarded = build(reset_ratio=None)
    for layer in masked_layers(unguarded).values():
        layer.reset_threshold(10.0)
    report = sparsity_report(unguarded)
    assert report.kept == 0 and report.remaining_ratio == 0.0
    assert report.layers[0].dead_rows == 6 and report.layers[0].dead_columns == 4
    assert report.layers[0].threshold_min == 10.0


def test_dense_layers_do_not_count():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify_(model, filter_fn=lambda module, name: name == "0")
    report = sparsity_report(model)
    assert report.total == 16 and report.remaining_ratio == 1.0


def test_one_wait_for_the_whole_model(monkeypatch):
    """On the meta device every read of a value fails; only the one `tolist` is let through."""
    model = build().to("meta")
    reads = []

    def tolist(tensor):
        reads.append(tuple(tensor.shape))
        return torch.ones(tensor.shape).numpy().tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    report = sparsity_report(model)
    assert reads == [(5, 6)] and report.kept == 5
    assert dst_kernels.remaining_ratio(model).device.type == "meta"
    assert dst_kernels.sparse_regularization(model).device.type == "meta"
    assert len(reads) == 1


def test_printed():
    model = build()
    report = sparsity_report(model)
    lines = str(report).splitlines()
    assert len(lines) == len(report.layers) + 5
    assert lines[0].split()[:3] == ["layer", "shape", "remaining"]
    head = next(line for line in lines if line.startswith("3.head"))
    entry = report.layers[3]
    assert head.split()[1:5] == ["5x7", f"{entry.remaining_ratio:.2%}", str(entry.kept), "35"]
    assert lines[-2].split() == [
        "model",
        f"{report.remaining_ratio:.2%}",
        str(report.kept),
        str(report.total),
    ]
    assert lines[-1] == "100.0% of all 250 weights are masked"
    assert "(root)" in str(sparsity_report(sparsify_(nn.Linear(2, 2))))
    little = sparsity_report(sparsify_(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))))
    assert str(little).endswith("40.0% of all 10 weights are masked")


def test_to_dict_is_json():
    report = sparsity_report(build())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["kept"] == report.kept and values["total"] == report.total
    assert values["remaining_ratio"] == report.remaining_ratio
    for entry, value in zip(report.layers, values["layers"], strict=True):
        assert value == {**dataclasses.asdict(entry), "shape": list(entry.shape)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = build().to(dtype)
    for entry, layer in zip(
        sparsity_report(model).layers, masked_layers(model).values(), strict=True
    ):
        mask, threshold, *_ = by_hand(layer)
        assert entry.kept == mask.sum().item()
        assert entry.threshold_max == threshold.max().item()


@pytest.mark.parametrize(
    "function",
    [
        sparsity_report,
        dst_kernels.remaining_ratio,
        dst_kernels.sparse_regularization,
        dst_kernels.parameter_groups,
    ],
)
def test_a_model_without_masked_layers_is_an_error(function):
    with pytest.raises(ValueError, match=r"Sequential.*sparsify_"):
        function(nn.Sequential(nn.Linear(2, 2)))
