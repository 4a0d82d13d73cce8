"""Shapes, dtypes, strides and devices without data: fake CUDA tensors, forward and backward.

The autograd engine needs a real device, so backward runs by calling the output's node.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dst_kernels.functional as dst

from .convolutions import GEOMETRIES

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode() as mode:
        yield mode


def leaf(*shape, dtype=torch.float32, format=torch.contiguous_format):
    tensor = torch.empty(shape, dtype=dtype, device="cuda")
    return tensor.contiguous(memory_format=format).requires_grad_()


def same(result, like, shape=None):
    assert result.device.type == "cuda"
    assert result.dtype == like.dtype
    assert result.shape == (like.shape if shape is None else shape)
    if shape is None:
        assert result.stride() == like.stride()


def backward_nodes(output, grad):
    """The gradients by leaf of a chain of views around one custom node."""
    node, grads = output.grad_fn, (grad,)
    while not type(node).__name__.startswith("_Masked"):
        grads = (node(*grads),)
        node = node.next_functions[0][0]
    return node.apply(*grads)


@every_dtype
def test_weight_ops(dtype):
    for shape in ((8,), (), (8, 4)):
        check_weight_ops(leaf(8, 4, dtype=dtype), leaf(*shape))


def check_weight_ops(weight, threshold):
    same(dst.effective_threshold(weight, threshold), threshold)
    mask = dst.threshold_mask(weight, threshold)
    assert mask.shape == weight.shape and mask.dtype == torch.bool and mask.is_cuda
    ratio = dst.remaining_ratio(weight, threshold)
    assert ratio.shape == () and ratio.dtype == torch.float32 and ratio.is_cuda
    output = dst.masked_weight(weight, threshold)
    same(output, weight)
    grads = output.grad_fn.apply(torch.empty_like(output))
    same(grads[0], weight)
    same(grads[1], threshold)
    same(dst.sparse_regularization(threshold), threshold, ())


@every_dtype
def test_linear(dtype):
    for batch in ((), (2,), (2, 3), (0,)):
        input, weight = leaf(*batch, 4, dtype=dtype), leaf(8, 4, dtype=dtype)
        threshold, bias = leaf(8), leaf(8, dtype=dtype)
        output = dst.masked_linear(input, weight, threshold, bias)
        same(output, input, (*batch, 8))
        assert output.is_contiguous()
        grads = output.grad_fn.apply(torch.empty_like(output))
        for grad, argument in zip(grads, (input, weight, threshold, bias), strict=False):
            same(grad, argument)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution(geometry, fake):
    input, weight = leaf(*geometry.input), leaf(*geometry.weight)
    threshold, bias = leaf(geometry.weight[0]), leaf(geometry.weight[0])
    output = geometry.ours(input, weight, threshold, bias, **geometry.options)
    expected = geometry.torchs(
        torch.empty(geometry.input), torch.empty(geometry.weight), **geometry.options
    )
    same(output, input, expected.shape)
    grads = backward_nodes(output, torch.empty_like(output))
    assert grads[0].is_cuda and grads[0].dtype == input.dtype
    for grad, argument in zip(grads[1:], (weight, threshold, bias), strict=False):
        same(grad, argument)


@pytest.mark.parametrize("spatial", [2, 3])
def test_channels_last(spatial):
    format = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial]
    run = {2: dst.masked_conv2d, 3: dst.masked_conv3d}[spatial]
    input = leaf(2, 4, *[5] * spatial, format=format)
    weight = leaf(6, 4, *[3] * spatial, format=format)
    output = run(input, weight, leaf(6))
    assert output.is_contiguous(memory_format=format)
    grads = output.grad_fn.apply(torch.empty_like(output))
    same(grads[0], input)
    same(grads[1], weight)


def test_wrong_arguments_are_refused_without_data():
    with pytest.raises(ValueError, match="threshold must have shape"):
        dst.masked_weight(leaf(8, 4), leaf(3))
    with pytest.raises(ValueError, match="device"):
        dst.masked_weight(leaf(8, 4), torch.empty(8))
    with pytest.raises(ValueError, match="bias must have shape"):
        dst.masked_linear(leaf(2, 4), leaf(8, 4), leaf(8), leaf(4))
