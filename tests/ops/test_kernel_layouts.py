"""Kernels that torch reads wrongly: between contiguous and channels last."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
import dst_kernels.functional as dst

# Dimensions of one element have another stride than channels last gives them.
PLAIN = dst_kernels.SparsifyConfig(structure_gradient=False)
LAYOUTS = [((6, 3, 3, 1, 1), (9, 1, 3, 1, 1)), ((6, 3, 1, 3), (9, 1, 7, 3))]


def kernel_and_input(shape, strides, dtype, groups, transposed):
    kernel = torch.empty_strided(shape, strides).copy_(torch.randn(shape)).to(dtype)
    assert kernel.stride() == strides
    channels = shape[0] if transposed else shape[1] * groups
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    input = torch.randn(2, channels, *[5, 4, 6][: len(shape) - 2]).to(dtype)
    return kernel, input.contiguous(memory_format=last)


@pytest.mark.parametrize("way", ["packed", "fused", "mixed", "transposed", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "strides"), LAYOUTS)
def test_layouts_that_torch_reads_wrongly(shape, strides, dtype, way):
    transposed = way == "transposed"
    kernel, input = kernel_and_input(shape, strides, dtype, 2, transposed)
    spatial = len(shape) - 2
    plain = getattr(F, f"conv_transpose{spatial}d" if transposed else f"conv{spatial}d")
    rows = shape[1] * 2 if transposed else shape[0]
    threshold = torch.zeros(rows, dtype=torch.promote_types(dtype, torch.float32))
    weight, x = kernel.requires_grad_(), input.requires_grad_()
    options = {"structure_gradient": False, "backend": "reference"}
    if way == "grouped":
        layer = getattr(nn, f"Conv{spatial}d")(6, 6, shape[2:], groups=2, bias=False, dtype=dtype)
        layer.weight = nn.Parameter(weight.detach())
        model = dst_kernels.sparsify_(nn.Sequential(layer), PLAIN)
        output, weight = dst_kernels.group_(model)(x), layer.weight
    elif transposed:
        output = getattr(dst, f"masked_{plain.__name__}")(x, weight, threshold, groups=2, **options)
    else:
        operation = getattr(dst, f"masked_conv{spatial}d")
        output = operation(x, weight, threshold, groups=2, path=way, **options)
    grad = torch.randn(output.shape).to(dtype)
    ours = output, *torch.autograd.grad(output, (x, weight), grad)
    double = [each.detach().double().contiguous().requires_grad_() for each in (x, weight)]
    expected = plain(*double, groups=2)
    truth = expected, *torch.autograd.grad(expected, double, grad.double())
    for one, other in zip(ours, truth, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 8 * torch.finfo(dtype).eps
