"""`sparsify_`, `finalize_` and `densify_` change what a layer is, not which object it is."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call
from users_layers import (
    LAYERS,
    Direct,
    Held,
    build,
    forward_in_a_process,
    input_of,
    output_of,
    prune,
    torchs,
)

import dst_kernels
from dst_kernels import SparsifyConfig, densify_, finalize_, sparsify_
from dst_kernels.nn import MaskedLinear, MaskedModule
from dst_kernels.optim import DSTSGD

every_layer = pytest.mark.parametrize("kind", LAYERS)


def converted(kind, **options):
    layer = build(kind)
    assert sparsify_(layer, SparsifyConfig(**options)) is layer
    return prune(layer)


def masked_parameters(layer):
    """Return a dense layer's parameters as functions of a masked layer's: W * M and the others."""
    transposed = isinstance(layer, nn.ConvTranspose1d)
    rows = (lambda weight: weight.transpose(0, 1)) if transposed else (lambda weight: weight)
    found = {}
    for part in layer.masked_weights():
        weights = part.weight.chunk(part.matrices)
        thresholds = part.threshold.chunk(part.matrices)
        options = {"reset_ratio": layer.masking.reset_ratio, "surrogate": layer.masking.surrogate}
        made = [
            dst_kernels.functional.masked_weight(rows(weight), threshold, **options)
            for weight, threshold in zip(weights, thresholds, strict=True)
        ]
        found[part.name] = rows(torch.cat(made))
    others = {n: p for n, p in layer.named_parameters() if "threshold" not in n}
    return {**others, **found}


# -- one layer ---------------------------------------------------------------------------------


@every_layer
def test_a_converted_layer_is_the_same_object(kind):
    layer, calls = build(kind), []
    parameters, attributes = dict(layer.named_parameters()), dict(vars(layer))
    handle = layer.register_forward_hook(lambda *call: calls.append("hook"))
    expected = output_of(layer, input_of(kind))
    assert sparsify_(layer) is layer
    assert isinstance(layer, MaskedModule) and isinstance(layer, kind)
    assert type(layer) is not kind
    for name, parameter in parameters.items():
        assert getattr(layer, name) is parameter
    for name, value in attributes.items():
        assert vars(layer)[name] is value or name == "_flat_weights", name
    assert torch.equal(output_of(layer, input_of(kind)), expected)
    assert len(calls) % 2 == 0
    handle.remove()
    assert not layer._forward_hooks


@every_layer
@pytest.mark.parametrize("scope", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_a_pruned_layer_computes_its_own_forward_with_masked_weights(kind, scope):
    layer, dense = converted(kind), build(kind)
    parameters = list(layer.parameters())
    x, same_x = input_of(kind, True), input_of(kind, True)
    with scope():
        expected = functional_call(dense, masked_parameters(layer), (same_x,))
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
        output = output_of(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(output, output_of(dense, x))
    if not output.requires_grad:
        return
    theirs = torch.autograd.grad(expected.square().sum(), [same_x, *parameters])
    ours = torch.autograd.grad(output.square().sum(), [x, *parameters])
    for actual, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, its, rtol=1e-11, atol=1e-11)
    thresholds = [g for g, (n, _) in zip(ours[1:], layer.named_parameters(), strict=True)
                  if "threshold" in n]  # fmt: skip
    assert thresholds and all(gradient.any() for gradient in thresholds)


@every_layer
@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_finalize_keeps_the_object_and_the_outputs(kind, granularity):
    layer = converted(kind, granularity=granularity).eval()
    parameters = {n: p for n, p in layer.named_parameters() if "threshold" not in n}
    with torch.no_grad():
        expected = output_of(layer, input_of(kind))
        assert finalize_(layer) is layer and type(layer) is kind
        torch.testing.assert_close(output_of(layer, input_of(kind)), expected)
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name]
    assert any((parameter == 0).any() for parameter in layer.parameters())
    assert vars(layer).keys() == vars(build(kind)).keys()


@every_layer
def test_densify_gives_back_what_was_there(kind):
    layer, before = converted(kind), build(kind)
    parameters = dict(layer.named_parameters())
    assert densify_(layer) is layer and type(layer) is kind
    assert vars(layer).keys() == vars(before).keys()
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before.get_parameter(name))
    assert torch.equal(output_of(layer, input_of(kind)), output_of(before, input_of(kind)))
    again = type(sparsify_(layer))
    assert again is type(sparsify_(before)), "classes are made once"


def test_methods_go_on():
    layer = converted(LAYERS[0])
    assert layer.kind == "relevance" and layer.scale == 0.5 and layer.notes == ["kept"]
    assert torch.equal(layer.relprop(torch.ones(1, 5).double()), layer.weight.sum(0)[None] * 0.5)


# -- copies, files, processes ------------------------------------------------------------------


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "an old pickle protocol": lambda layer: pickle.loads(pickle.dumps(layer, 2)),
    "torch.save": through_a_file,
}


@every_layer
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(kind, copied):
    layer, x = converted(kind, surrogate="triangular"), input_of(kind)
    twin = copied(nn.Sequential(layer))[0]
    assert type(twin) is type(layer) and twin.masking == layer.masking
    assert twin.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(output_of(twin, x), output_of(layer, x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(output_of(twin, x), output_of(layer, x)), "its own parameters"
    output_of(twin, x).sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert type(densify_(twin)) is kind and isinstance(layer, MaskedModule)


def test_a_spawned_process_gets_the_model():
    model = nn.Sequential(*map(converted, LAYERS))
    inputs = [input_of(kind) for kind in LAYERS]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=forward_in_a_process, args=(model, inputs, queue))
    process.start()
    outputs = queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    for layer, x, output in zip(model, inputs, outputs, strict=True):
        torch.testing.assert_close(output_of(layer, x), torch.tensor(output).double())


# -- models that hold their layers in other ways -----------------------------------------------


def test_every_reference_to_a_layer_is_masked():
    model, x = sparsify_(Held()), torch.randn(3, 4).double()
    masked = {n: m for n, m in model.named_modules() if isinstance(m, MaskedModule)}
    assert len(masked) == 7
    assert model.list[0] is model.a is model.module_list[0] and model.alias is model.c
    assert torch.equal(model(x), Held()(x))
    pruned = prune(model)(x)
    assert not torch.allclose(pruned, Held()(x))
    pruned.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    by_hand = Held()
    with torch.no_grad():
        for name, layer in masked.items():
            by_hand.get_submodule(name).load_state_dict(
                OrderedDict(weight=layer.weight * layer.mask(), bias=layer.bias)
            )
    torch.testing.assert_close(pruned, by_hand(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("back", [finalize_, densify_])
def test_every_reference_goes_back(back):
    model, x = prune(sparsify_(Held())).eval(), torch.randn(3, 4).double()
    expected = model(x) if back is finalize_ else Held()(x)
    assert back(model) is model
    assert [type(m) for m in (model.list[0], model.dict["b"][0], model.alias)] == [nn.Linear] * 3
    assert model.list[0] is model.a and type(model.module_list[1]) is Direct
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    assert model.state_dict().keys() == Held().state_dict().keys()


@pytest.mark.parametrize("back", [finalize_, densify_])
@pytest.mark.parametrize("deferred", [False, True], ids=["grouped", "deferred"])
def test_a_grouped_or_deferred_model_goes_back(back, deferred):
    """Leaves no hook and no optimizer's gradients behind."""
    model, x = prune(sparsify_(Held())), torch.randn(3, 4).double()
    if deferred:
        optimizer = DSTSGD(model, lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        dst_kernels.group_(model)
        model(x).square().sum().backward()
        model.zero_grad()
    expected = model.eval()(x)
    back(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    if back is finalize_:
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    fresh = Held()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Direct(4, 4)).double()
    model[2].weight = model[0].weight
    sparsify_(model)
    assert model[2].threshold is model[0].threshold and model[2].weight is model[0].weight
    prune(model)
    weight, baked = model[0].weight, model[0].weight * model[0].mask()
    x = torch.randn(2, 4).double()
    expected = model.eval()(x)
    finalize_(model)
    assert model[0].weight is weight is model[2].weight
    assert torch.equal(weight, baked)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)


def test_a_second_conversion_changes_nothing():
    model = prune(sparsify_(Held()))
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    sparsify_(model, SparsifyConfig(granularity="layer"))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def train(model, make_optimizer, steps=5):
    optimizer = make_optimizer(model)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def test_users_layers_train_alike_in_every_way():
    """Layer by layer, grouped and deferred, at the places where lists and closures hold them."""

    def of_torch(model):
        return torch.optim.SGD(dst_kernels.parameter_groups(model), lr=0.1, momentum=0.9)

    def model():
        return prune(sparsify_(Held()))

    plain = train(model(), of_torch)
    grouped = train(dst_kernels.group_(model()), of_torch)
    deferred = train(model(), lambda each: DSTSGD(each, lr=0.1, momentum=0.9))
    for name, value in plain.state_dict().items():
        for other in (grouped, deferred):
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=1e-13)
    assert isinstance(plain.module_list[1], MaskedLinear) and torchs(Direct) is nn.Linear
