"""Which layers `sparsify_` converts, which it leaves dense, and the reasons it gives."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dst_kernels
from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLinear,
    MaskedModule,
)
from dst_kernels.nn.find import named_masked_weights


def reasons(model, *args, **kwargs):
    """{name: reason} of the layers that stay dense, from the plan and checked against the deed."""
    plan = dst_kernels.plan_sparsify(model, *args, **kwargs)
    converted = dst_kernels.sparsify_(model, *args, **kwargs)
    masked = {n for n, m in converted.named_modules() if isinstance(m, MaskedModule)}
    assert masked == {*plan.named("convert"), *plan.named("masked")}
    skipped = {layer.name: layer.reason for layer in plan.layers if layer.action == "skip"}
    assert all(skipped.values()), "every skip has a reason"
    return skipped


CONVOLUTIONS = {
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
}


def test_every_kind_of_layer_in_every_kind_of_container():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "convs": nn.ModuleList([conv(2, 3, 1) for conv in CONVOLUTIONS]),
            "deep": nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())),
        }
    )
    assert reasons(model) == {}
    assert type(model["linear"]) is MaskedLinear
    assert [type(m) for m in model["convs"]] == list(CONVOLUTIONS.values())
    assert type(model["deep"][0][0][0]) is MaskedLinear


def test_a_root_that_is_itself_a_layer():
    linear = nn.Linear(3, 2)
    weight = linear.weight
    masked = dst_kernels.sparsify_(linear)
    assert masked is linear and type(masked) is MaskedLinear and masked.weight is weight
    assert dst_kernels.sparsify_(masked) is masked
    assert [layer.name for layer in dst_kernels.plan_sparsify(linear).layers] == [""]


def others():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 2),
            "bag": nn.EmbeddingBag(4, 2),
            "bilinear": nn.Bilinear(2, 2, 2),
            "cell": nn.LSTMCell(2, 2),
            "norm": nn.BatchNorm2d(2),
        }
    )


def test_weights_of_other_modules():
    found = reasons(others())
    assert set(found) == {"embedding", "bag"} and "embeddings=True" in found["bag"]
    model = others()
    dst_kernels.sparsify_(model, dst_kernels.SparsifyConfig(embeddings=True))
    names = {name for name, _ in named_masked_weights(model)}
    assert names == {f"{n}.weight" for n in ("embedding", "bag", "bilinear")} | {
        "cell.weight_ih", "cell.weight_hh"
    }  # fmt: skip
    found = reasons(others(), dst_kernels.SparsifyConfig(parameters=False))
    assert set(found) == {"embedding", "bag", "bilinear", "cell"}


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class OwnOutputPadding(nn.ConvTranspose2d):
    def _output_padding(self, *args, **kwargs):
        return [1, 1]


class Renamed(nn.Linear):
    """Nothing of its own: behaves as its parent."""


def patched_on_the_instance():
    layer = nn.Linear(3, 3)
    layer.forward = functools.partial(nn.Linear.forward, layer)
    return layer


def weight_computed_by_a_hook():
    return torch.nn.utils.spectral_norm(nn.Linear(3, 3))


def integer_weight():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def weight_is_a_plain_tensor():
    layer = nn.Linear(3, 3)
    del layer.weight
    layer.weight = torch.zeros(3, 3)
    layer.scores = nn.Parameter(torch.zeros(3, 3))
    return layer


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: parametrizations.weight_norm(nn.LSTM(3, 3), "weight_hh_l0"), "parametrized"),
        (lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 3, 1)), "parametrized"),
        (lambda: nn.Embedding(3, 3), "embedding"),
        (weight_computed_by_a_hook, "not a parameter"),
        (lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), "not a parameter"),
        (weight_is_a_plain_tensor, "not a parameter"),
        (lambda: nn.LazyLinear(3), "no weights yet"),
        (lambda: nn.LazyConv2d(3, 1), "no weights yet"),
        (patched_on_the_instance, "replaced on the instance"),
        (integer_weight, "int8"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_layers_that_cannot_be_converted(build, reason):
    model = nn.Sequential(nn.Linear(3, 3), build())
    kept = model[1]
    found = reasons(model)
    assert next(iter(found)) == "1" and reason in found["1"]
    assert model[1] is kept and isinstance(model[0], MaskedLinear)


@pytest.mark.parametrize(
    "build, input",
    [
        (lambda: OwnForward(3, 4), torch.ones(2, 3)),
        (lambda: OwnConvForward(3, 4, 2), torch.ones(2, 3, 5, 5)),
        (lambda: OwnOutputPadding(3, 4, 2, 2), torch.ones(2, 3, 5, 5)),
    ],
)
def test_a_forward_of_its_own_computes_with_the_masked_weight(build, input):
    model = nn.Sequential(build())
    dst_kernels.sparsify_(model)
    model[0].reset_threshold(0.5 * model[0].weight.abs().max().item())
    expected, output = model[0].to_dense()(input), model(input)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert model[0].threshold.grad.any()
    assert 0 < model[0].remaining_ratio() < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm():
    model = nn.Sequential(nn.Linear(3, 3), torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    found = reasons(model)
    assert list(found) == ["1"] and "not a parameter" in found["1"]
    input = torch.randn(2, 3)
    model(input).sum().backward()


def test_a_lazy_layer_converts_after_its_first_forward():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.randn(1, 2))
    assert reasons(model) == {} and tuple(model[0].weight.shape) == (3, 2)


def test_a_subclass_without_a_forward_of_its_own_converts():
    model = nn.Sequential(Renamed(3, 3))
    weight = model[0].weight
    assert reasons(model) == {} and isinstance(model[0], MaskedLinear)
    assert model[0].weight is weight


def test_attention_is_masked_by_parameter():
    class Mine(nn.MultiheadAttention):
        def forward(self, *args):
            return super().forward(*args, need_weights=False)[0]

    model = nn.ModuleDict({"attention": Mine(4, 2), "after": nn.Linear(4, 4)})
    assert not reasons(model)
    found = {name for name, _ in named_masked_weights(model)}
    assert found == {"attention.in_proj_weight", "attention.out_proj", "after"}
    assert isinstance(model["attention"], Mine)
    plan = dst_kernels.plan_sparsify(
        nn.MultiheadAttention(4, 2), dst_kernels.SparsifyConfig(parameters=False)
    )
    assert plan.named("convert") == ["out_proj"] and "no masked" in plan.layers[0].reason


def test_filter_fn_sees_each_candidate_with_its_full_name():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)), nn.ReLU(), nn.Conv2d(3, 3, 1)
    )
    modules = dict(model.named_modules())
    seen = []

    def keep_convolutions(module, name):
        seen.append((name, module))
        return isinstance(module, nn.Conv2d)

    plan = dst_kernels.plan_sparsify(model, filter_fn=keep_convolutions)
    assert seen == [(name, modules[name]) for name in ("0.0", "2")]
    assert plan.named("convert") == ["2"]
    found = reasons(model, filter_fn=keep_convolutions)
    assert found["0.0"] == "filter_fn" and isinstance(model[2], MaskedConv2d)


def test_config_choices():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(1, 8, 3),
            nn.Linear(8, 4, bias=False),
            nn.ConvTranspose2d(8, 16, 3, groups=8),
            nn.ConvTranspose2d(8, 4, 3, groups=4),
            nn.Linear(4, 10),
        )

    cases = {
        "skip_first": ["0"],
        "skip_last": ["7"],
        "skip_depthwise": ["1", "5"],
    }
    for option, names in cases.items():
        found = reasons(build(), dst_kernels.SparsifyConfig(**{option: True}))
        assert found == dict.fromkeys(names, option)
    found = reasons(build(), dst_kernels.SparsifyConfig(min_numel=40))
    assert found == {"4": "min_numel: 32 < 40 weights"}
    assert reasons(build(), dst_kernels.SparsifyConfig(min_numel=32)) == {}


def test_first_and_last_are_convertible_ones():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(2))
    found = reasons(model, dst_kernels.SparsifyConfig(skip_first=True, skip_last=True))
    assert found["1"] == "skip_first" and found["2"] == "skip_last"


@pytest.mark.parametrize("path", ["auto", "packed", "fused", "mixed", "sparse"])
def test_transposed_convolutions_stay_dense_where_the_path_is_not_theirs(path):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 2, 3), nn.ConvTranspose1d(2, 2, 3))
    config = dst_kernels.SparsifyConfig(path=path, skip_last=True)
    found = reasons(model, config)
    if path in ("auto", "packed"):
        assert found == {"2": "skip_last"}
    else:
        assert found == {"1": "skip_last", "2": f"has no path '{path}', only auto and packed"}


def test_options_reach_every_layer():
    config = dst_kernels.SparsifyConfig(
        granularity="element",
        reset_ratio=None,
        surrogate="rectangular",
        structure_gradient=False,
        backend="reference",
    )
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 1)), config)
    for layer in model:
        for name, value in config.layer_options().items():
            assert getattr(layer, name) == value
        assert layer.threshold.shape == layer.weight.shape


def test_what_happened_is_logged(caplog):
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2))
    with caplog.at_level(logging.DEBUG, logger="dst_kernels"):
        dst_kernels.sparsify_(model)
    lines = [record.getMessage() for record in caplog.records]
    assert any("convert 0" in line for line in lines)
    assert any("skip 1" in line and "Embedding" in line for line in lines)
    assert "1 layers to convert, 0 masked already, 1 skipped" in lines[-1]


def test_hooks_flags_and_attributes_are_kept():
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), []
    model[0].eval()
    model[0].note = "mine"
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    model[0].weight.requires_grad_(False)
    model.register_forward_pre_hook(lambda module, args: seen.append("model"))
    dst_kernels.sparsify_(model)
    assert not model[0].training and model[1][0].training and model.training
    assert model[0].note == "mine" and not model[0].weight.requires_grad
    model(torch.randn(1, 2))
    assert seen == ["model", MaskedLinear]
    dst_kernels.finalize_(model)
    assert not model[0].training and model[1][0].training and model[0].note == "mine"
    model(torch.randn(1, 2))
    assert seen == ["model", MaskedLinear, "model", nn.Linear]
