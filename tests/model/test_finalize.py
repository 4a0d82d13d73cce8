"""`finalize_`: plain torch.nn again, with the masks baked in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from zoo import masked_layers, prune_half

import dst_kernels
from dst_kernels import SparsifyConfig, finalize_, sparsify_


def build(granularity="row"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )
    sparsify_(model, SparsifyConfig(granularity=granularity))
    prune_half(model)
    return model.eval()


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_bit_equal_outputs_and_plain_modules(granularity):
    model, input = build(granularity), torch.randn(2, 3, 7, 7)
    expected = model(input)
    parameters = dict(model.named_parameters())
    assert 0.2 < dst_kernels.remaining_ratio(model) < 0.8
    assert finalize_(model) is model
    assert not masked_layers(model)
    assert [type(m) for m in model][::3] == [nn.Conv2d, nn.Conv2d]
    assert all(type(m).__module__.startswith("torch.nn") for m in model)
    assert torch.equal(model(input), expected)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter is parameters[name]
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bit_equal_in_other_dtypes(dtype):
    model, input = build().to(dtype), torch.randn(2, 3, 7, 7, dtype=dtype)
    expected = model(input)
    assert torch.equal(finalize_(model)(input), expected)


def test_twice_is_once():
    model = finalize_(build())
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert finalize_(model) is model
    assert all(modules[name] is module for name, module in model.named_modules())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    untouched = nn.Linear(2, 2)
    assert finalize_(untouched) is untouched


def test_a_root_that_is_itself_masked():
    layer = sparsify_(nn.Linear(4, 3))
    dense = finalize_(layer)
    assert type(dense) is nn.Linear and torch.equal(dense.weight, layer.weight)


@pytest.mark.parametrize("format", ["CSR", "", "Dense", None])
def test_unknown_format(format):
    model = build()
    with pytest.raises(ValueError, match="format must be one of dense, compact, csr, auto"):
        finalize_(model, format)
    assert len(masked_layers(model)) == 3, "and nothing happened"
    assert not masked_layers(finalize_(model, format="dense"))


def test_a_collapsed_layer_is_finalised_at_its_effective_threshold():
    model, input = build(), torch.randn(2, 3, 7, 7)
    model[5].reset_threshold(100.0)
    expected, weight = model(input), model[5].weight.clone()
    finalize_(model)
    assert torch.equal(model[5].weight, weight)
    assert torch.equal(model(input), expected)


def test_the_original_of_a_copy_stays_trainable():
    model = build()
    weights = {name: layer.weight.clone() for name, layer in masked_layers(model).items()}
    final = finalize_(copy.deepcopy(model))
    assert len(masked_layers(model)) == 3
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert torch.count_nonzero(final.get_submodule(name).weight) < weight.numel()


def test_training_goes_on_dense():
    model = finalize_(build()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zeros = (model[5].weight == 0).sum()
    model(torch.randn(4, 3, 7, 7)).square().sum().backward()
    optimizer.step()
    assert (model[5].weight == 0).sum() < zeros


def test_convert_again():
    model, input = build(), torch.randn(2, 3, 7, 7)
    expected = model(input)
    again = sparsify_(finalize_(model))
    assert len(masked_layers(again)) == 3 and torch.equal(again(input), expected)


def test_export():
    model, input = finalize_(build()), torch.randn(2, 3, 7, 7)
    exported = torch.export.export(model, (input,)).module()
    assert torch.equal(exported(input), model(input))


def test_parametrizations_since_conversion_go_with_the_masks():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, input = build(), torch.randn(2, 3, 7, 7)
    shared = nn.Linear(5, 5)
    model.extend([shared, nn.Linear(5, 5)])
    model[-1].weight = shared.weight
    for layer in (model[0], *model[-2:]):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    torch.nn.utils.parametrizations.weight_norm(model[3])
    other, expected = copy.deepcopy(model), model(input)
    finalize_(model)
    assert not any(map(torch.nn.utils.parametrize.is_parametrized, model[:6]))
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)
    torch.testing.assert_close(other(input), expected, rtol=0, atol=0)
