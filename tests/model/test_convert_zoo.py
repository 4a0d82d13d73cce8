"""Real models, all the way: convert, train a step, prune half, make dense again, export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import (
    EXAMPLES,
    Example,
    image,
    masked_layers,
    masked_weights,
    mobilenet_v3_start,
    prune_half,
    settle,
)

import dst_kernels

MOBILENET_START = Example("mobilenet_v3_start", mobilenet_v3_start, image(32), 21)
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def converted(example):
    return dst_kernels.sparsify_(example.build())


def training_step(model, step_model, input):
    loss = step_model(input).float().square().mean()
    (loss + 1e-3 * dst_kernels.sparse_regularization(model)).backward()


def assert_close(actual, expected, exact):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **tolerance)


@every_example
def test_outputs_stay_the_same(example):
    model, input = settle(example.build(), example.input()), example.input()
    expected = model(input)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert dst_kernels.sparsify_(model) is model
    weights = masked_weights(model)
    assert len(weights) == example.masked
    assert_close(model(input), expected, example.exact)
    assert_close(settle(model, input, 0)(input), expected, example.exact)
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter, name
    added = [key for key in model.state_dict() if key not in keys]
    assert len(added) == len(weights) and all("threshold" in key for key in added)
    assert [key for key in model.state_dict() if key not in added] == keys


@every_example
def test_training_outputs_and_gradients_match_the_dense_model_below_every_weight(example):
    """At t = -1 with |W| > 0 every margin is beyond the surrogate's reach."""
    dense, input = example.build(), example.input()
    masked = dst_kernels.sparsify_(copy.deepcopy(dense))
    for part in masked_weights(masked).values():
        part.module.reset_threshold(-1.0)
    for model in (dense, masked):
        torch.manual_seed(1)  # stochastic depth
        model(input).square().mean().backward()
    for name, parameter in dense.named_parameters():
        actual = masked.get_parameter(name).grad
        if parameter.grad is None:
            assert actual is None, name
        else:
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=name, marks=pytest.mark.slow)
        for name, example in {**EXAMPLES, "mobilenet_v3_small": MOBILENET_START}.items()
    ],
)
def test_a_compiled_step_without_graph_breaks(example):
    """Every one of these models compiles without graph breaks when dense; so it does masked."""
    eager, input = converted(example).train(), example.input()
    prune_half(eager)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each, step_model in ((eager, eager), (model, compiled)):
        torch.manual_seed(1)
        training_step(each, step_model, input)
    for name, parameter in eager.named_parameters():
        actual, expected = model.get_parameter(name).grad, parameter.grad
        assert (actual is None) == (expected is None), name
        if expected is not None:
            scale = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * scale, msg=name)
    for name, part in masked_weights(model).items():
        assert torch.count_nonzero(part.threshold.grad), name


@every_example
def test_a_step_under_autocast(example):
    model, input = converted(example).train(), example.input()
    prune_half(model)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    touched = 0
    for name, part in masked_weights(model).items():
        grad = part.threshold.grad
        assert grad.dtype == part.weight.grad.dtype == torch.float32, name
        assert torch.isfinite(grad).all(), name
        touched += bool(torch.count_nonzero(grad))
    assert touched == example.masked


@every_example
def test_pruned_finalised_and_exported(example):
    model, input = converted(example), example.input()
    prune_half(model)
    settle(model, input)
    ratio = dst_kernels.remaining_ratio(model).item()
    assert 0.35 < ratio < 0.55
    with torch.no_grad():
        expected = model(input)
        dense_weights = copy.deepcopy(model)
        for part in masked_weights(dense_weights).values():
            part.module.reset_threshold()
        change = (dense_weights(input) - expected).abs().max() / expected.abs().max()
        assert change > 1e-2, "pruning matters in this test"
    masks = {name: layer.mask() for name, layer in masked_layers(model).items()}
    original_types = {name: type(module) for name, module in example.build().named_modules()}

    final = dst_kernels.finalize_(model)
    assert final is model and not masked_layers(final)
    assert {n: type(m) for n, m in final.named_modules()} == original_types
    for name, mask in masks.items():
        assert torch.equal(final.get_submodule(name).weight != 0, mask), name
    assert not any("threshold" in key for key in final.state_dict())
    with torch.no_grad():
        assert_close(final(input), expected, example.exact)
    if example.name != "gpt2":  # transformers' own exporters are not this package's concern
        exported = torch.export.export(final, (input,)).module()
        torch.testing.assert_close(exported(input), final(input), rtol=1e-5, atol=1e-6)


@every_example
def test_the_dense_checkpoint_loads_into_the_converted_model(example):
    torch.manual_seed(5)
    dense = settle(example.build(), example.input())
    model = converted(example).eval()
    for part in masked_weights(model).values():
        part.module.reset_threshold(0.5)
    result = model.load_state_dict(dense.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert_close(model(example.input()), dense(example.input()), example.exact)


@every_example
def test_masked_checkpoint_round_trip(example):
    torch.manual_seed(5)
    model = converted(example)
    prune_half(model)
    settle(model, example.input())
    torch.manual_seed(6)
    other = converted(example).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(example.input()), model(example.input()))


def test_gpt2_rows_are_output_neurons():
    model = converted(EXAMPLES["gpt2"])
    layer = model.model.transformer.h[0].mlp.c_fc
    assert tuple(layer.weight.shape) == (16, 64) and tuple(layer.threshold.shape) == (64,)
    with torch.no_grad():
        layer.threshold[3] = 100.0
    mask = layer.mask()
    assert mask.shape == layer.weight.shape
    assert not mask[:, 3].any() and mask.sum() == layer.weight.numel() - 16
    input = torch.randn(2, 5, 16)
    assert torch.equal(layer(input)[..., 3], layer.bias[3].expand(2, 5))
    assert type(layer).__name__ in repr(layer) and "granularity=row" in repr(layer)


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_gpt2_layer_gradients_are_those_of_the_transposed_linear(granularity):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv1d = dst_kernels.sparsify_(
        Conv1D(5, 4).double(), dst_kernels.SparsifyConfig(granularity=granularity)
    )
    nn.init.normal_(conv1d.weight)
    linear = dst_kernels.nn.MaskedLinear(4, 5, granularity=granularity, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.t())
        linear.bias.copy_(conv1d.bias)
        linear.threshold.uniform_(0, 1)
        element = granularity == "element"
        conv1d.threshold.copy_(linear.threshold.t() if element else linear.threshold)
    input = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(conv1d(input), linear(input), rtol=1e-13, atol=1e-13)
    for layer in (conv1d, linear):
        layer(input).square().sum().backward()
    pairs = [(conv1d.weight.grad, linear.weight.grad.t()), (conv1d.bias.grad, linear.bias.grad)]
    threshold_grad = linear.threshold.grad
    pairs.append((conv1d.threshold.grad, threshold_grad.t() if element else threshold_grad))
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
