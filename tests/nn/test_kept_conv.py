"""Convolutions on the path "sparse" train as on "packed"; what the planner judges them by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels import nn as mnn
from dst_kernels import optim
from dst_kernels.autograd.conv import _Conv
from dst_kernels.plan import most_kept
from dst_kernels.reference.conv import Geometry

LAYERS = {
    "strided": lambda **how: mnn.MaskedConv2d(6, 8, 3, stride=2, padding=1, groups=2, **how),
    "same": lambda **how: mnn.MaskedConv2d(6, 8, (2, 3), padding="same", **how),
    "circular": lambda **how: mnn.MaskedConv2d(6, 8, 3, padding=1, padding_mode="circular", **how),
    "1d": lambda **how: mnn.MaskedConv1d(6, 8, 5, dilation=2, padding=3, **how),
    "3d": lambda **how: mnn.MaskedConv3d(6, 8, 2, **how),
}


def train(build, path, dtype, batched, deferred, steps=6):
    torch.manual_seed(0)
    layer = build(dtype=dtype, path=path)
    with torch.no_grad():
        layer.threshold.fill_(0.5 * layer.weight.abs().max())
    model = nn.Sequential(layer, nn.Tanh())
    parameters = [*model.parameters()]
    if deferred:
        optimizer = optim.DSTSGD(model, lr=0.01, momentum=0.9, alpha=1e-4)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    shape = ((5,) if batched else ()) + (6, *(7, 6, 5)[: layer.weight.dim() - 2])
    inputs = torch.randn(steps, *shape, dtype=dtype)
    results = []
    for each in inputs:
        optimizer.zero_grad()
        input = each.clone().requires_grad_()
        output = model(input)
        output.square().mean().backward()
        optimizer.step()
        results += [output.detach(), input.grad]
    return [*results, *(each.detach() for each in parameters)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_trains_as_a_packed_one(name, dtype):
    for deferred in (False, True):
        for batched in (True, False):
            packed, sparse = (
                train(LAYERS[name], path, dtype, batched, deferred) for path in ("packed", "sparse")
            )
            rtol = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(sparse, packed, rtol=rtol, atol=rtol)


def test_kept_rows_are_used_on_the_path_sparse(monkeypatch):
    used = []
    from dst_kernels.autograd import kept

    run = kept.implementation

    def implementation(backend, device, name):
        used.append(name)
        return run(backend, device, name)

    monkeypatch.setattr(kept, "implementation", implementation)
    for name, build in LAYERS.items():
        used.clear()
        train(build, "sparse", torch.float32, True, False, steps=1)
        assert ("kept_conv" in used and "kept_conv_grad_input" in used) == (name != "3d")


@pytest.mark.parametrize("path", ["sparse", "auto"])
def test_layouts_and_second_derivatives(path):
    torch.manual_seed(0)
    layer = mnn.MaskedConv2d(32, 64, 3, padding=1, path=path)
    with torch.no_grad():
        layer.threshold.fill_(0.9 * layer.weight.abs().max())
    packed = copy.deepcopy(layer)
    packed.masking = layer.masking._replace(path="packed")
    images = torch.randn(2, 32, 8, 8)
    for input in (images, images.contiguous(memory_format=torch.channels_last)):
        output, expected = layer(input), packed(input)
        torch.testing.assert_close(output, expected)
        assert output.stride() == expected.stride()
    seconds = []
    for each in (layer, packed):
        input = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(input).square().sum(), input, create_graph=True)
        seconds += torch.autograd.grad(first.square().sum(), input)
    torch.testing.assert_close(*seconds)


def test_sizes_by_which_the_planner_judges():
    geometry = Geometry((2, 2), (1, 1), (1, 1), 2)
    input, weight = torch.empty(5, 6, 9, 8), torch.empty(8, 3, 3, 3)
    assert _Conv.sizes(input, weight, geometry) == (5 * 5 * 4, 8, 27, "conv")
    pointwise = Geometry((1,), (0,), (1,), 1)
    input, weight = torch.empty(5, 6, 9), torch.empty(8, 6, 1)
    assert _Conv.sizes(input, weight, pointwise) == (45, 8, 6, "conv1x1")
    last = torch.empty(5, 6, 9, 8).contiguous(memory_format=torch.channels_last)
    copied = _Conv.sizes(last, torch.empty(8, 3, 3, 3), geometry)
    assert copied[0] == 0 and most_kept(*copied, torch.float32) == 0


@pytest.mark.parametrize("prepare", [dst_kernels.group_, lambda m: optim.DSTSGD(m, lr=0.1), str])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_autocast(kind, prepare):
    results = []
    for path in ("packed", "sparse"):
        torch.manual_seed(0)
        if kind == "conv":
            layer, shape = mnn.MaskedConv2d(8, 16, 3, path=path), (2, 8, 5, 6)
        else:
            layer, shape = mnn.MaskedLinear(72, 16, path=path), (5, 72)
        with torch.no_grad():
            layer.threshold.fill_(0.8 * layer.weight.abs().max())
        model = nn.Sequential(layer)
        kept = prepare(model)
        input = torch.randn(shape, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input)
        output.float().square().sum().backward()
        results.append([output, input.grad, layer.weight.grad, layer.bias.grad])
        del kept
    assert [each.dtype for each in results[0]] == [each.dtype for each in results[1]]
    torch.testing.assert_close(results[1], results[0], rtol=0.03, atol=0.03)
