"""Convolution layers on every path of every backend: how they pad, how results lie in memory."""

from __future__ import annotations

import copy

import pytest
import torch

from dst_kernels import autograd
from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)

from . import authors
from .backends import BACKENDS, every_backend
from .tolerance import assert_as_accurate

CONVS = (MaskedConv1d, MaskedConv2d, MaskedConv3d)
WAYS = every_backend("packed", "fused", "mixed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("exact_float32"),
]


def skip_what_triton_has_not(backend, path, spatial):
    if backend == "triton" and spatial == 3 and path != "packed":
        pytest.skip("Triton has no fused convolutions over three dimensions")


def results(layer, input):
    """Output, gradient of the input, gradients of the parameters by name."""
    input = input.clone().requires_grad_()
    output = layer(input)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    output.backward(cotangent.view_as(output))
    of_parameters = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return output.detach(), input.grad, of_parameters


def by_formula(layer, input, dtype):
    """With torch's own layer in `dtype`, and the method's formulas after it."""
    layer = copy.deepcopy(layer)
    weight, threshold = layer.weight.detach(), layer.threshold.detach()
    output, of_input, of_parameters = results(layer.to_dense().to(dtype), input.to(dtype))
    of_weight, of_threshold = authors.gradients(of_parameters["weight"], weight, threshold)
    return output, of_input, {**of_parameters, "weight": of_weight, "threshold": of_threshold}


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", (2, 0, 1)], ids=str)
@WAYS
def test_every_padding_mode(spatial, padding_mode, padding, backend, path, device):
    skip_what_triton_has_not(backend, path, spatial)
    padding = padding if padding == "same" else padding[:spatial]
    kernel = (4, 3, 2)[:spatial]  # even sizes: "same" pads one side more than the other
    layer = CONVS[spatial - 1](
        4, 6, kernel, padding=padding, padding_mode=padding_mode, groups=2, path=path,
        backend=backend, device=device,
    )  # fmt: skip
    layer.reset_threshold(0.5 * layer.weight.abs().max().item())
    assert 0.2 < layer.remaining_ratio() < 0.8
    input = torch.randn(2, 4, *(6, 5, 7)[:spatial], device=device)
    plain, exact = (by_formula(layer, input, dtype) for dtype in (torch.float32, torch.float64))
    ours = results(layer, input)
    for i in range(2):
        assert_as_accurate(ours[i], plain[i], exact[i])
    for name, gradient in ours[2].items():
        close, truth = plain[2][name].to(device, torch.float32), exact[2][name].to(device)
        assert_as_accurate(gradient, close, truth)


# -- memory formats --------------------------------------------------------------------------------

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packed_weight_lies_as_the_weight(spatial, channels_last, granularity, backend, device):
    layer = CONVS[spatial - 1](4, 6, (3, 2, 2)[:spatial], granularity=granularity, device=device)
    layer.reset_threshold(0.1)
    if channels_last:
        layer = layer.to(memory_format=FORMATS[spatial])
    for dtype in (torch.float32, torch.bfloat16):
        options = autograd.MaskOptions(backend=backend)
        masked, _ = autograd.pack(layer.weight, layer.threshold, options, dtype)
        assert masked.dtype == dtype and masked.stride() == layer.weight.stride()
        assert masked.is_contiguous(memory_format=FORMATS[spatial]) == channels_last


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("which", ["neither", "input", "weight", "both"])
@pytest.mark.parametrize("autocast", [False, True])
@WAYS
def test_results_are_channels_last_where_input_or_weight_is(
    spatial, which, autocast, backend, path, device
):
    skip_what_triton_has_not(backend, path, spatial)
    layer = CONVS[spatial - 1](4, 6, 3, padding=1, path=path, backend=backend, device=device)
    input = torch.randn(2, 4, *(5, 4, 3)[:spatial], device=device)
    if which in ("weight", "both"):
        layer = layer.to(memory_format=FORMATS[spatial])
    if which in ("input", "both"):
        input = input.to(memory_format=FORMATS[spatial])
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = layer(input.requires_grad_())
        dense = layer.to_dense()(input)
    if path != "fused":  # the product is torch's, and so is the choice, which differs among CPUs
        assert output.stride() == dense.stride()
    else:
        assert output.is_contiguous(memory_format=FORMATS[spatial]) == (which != "neither")
        assert output.is_contiguous() == (which == "neither")
    output.float().sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer_type", [MaskedConvTranspose2d, MaskedConvTranspose3d])
@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_convolutions_lie_as_torchs(layer_type, groups, backend, device):
    layer = layer_type(4, 6, 3, groups=groups, backend=backend, device=device)
    spatial = layer.weight.dim() - 2
    layer.reset_threshold(0.1)
    layer = layer.to(memory_format=FORMATS[spatial])
    input = torch.randn(2, 4, *(5, 4, 3)[:spatial], device=device)
    for each in (input, input.to(memory_format=FORMATS[spatial])):
        dense, output = layer.to_dense(), layer(each)
        assert dense.weight.stride() == layer.weight.stride()
        assert output.stride() == dense(each).stride()
        layer.zero_grad()
        output.sum().backward()
        assert layer.weight.grad.stride() == layer.weight.stride()
