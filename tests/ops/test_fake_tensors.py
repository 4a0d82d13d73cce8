"""Shapes, dtypes, strides and devices without data: fake CUDA tensors, forward and backward.

The autograd engine needs a real device, so backward runs by calling nodes by hand.
"""

from __future__ import annotations

import collections

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


def gradients_by_hand(output, grad):
    """The gradient of every leaf, by the nodes from output to leaves, each called in its turn."""
    uses = collections.Counter()

    def visit(node):
        for child, _ in node.next_functions:
            if child is not None:
                uses[child] += 1
                if uses[child] == 1:
                    visit(child)

    visit(output.grad_fn)
    ready, arrived, leaves = [output.grad_fn], {output.grad_fn: [grad]}, {}
    while ready:
        node = ready.pop()
        grads = arrived.pop(node)
        if hasattr(node, "variable"):
            leaves[node.variable] = grads[0].sum_to_size(node.variable.shape)  # as the engine does
            continue
        made = node.apply(*grads) if hasattr(node, "apply") else node(*grads)
        made = made if isinstance(made, tuple) else (made,)
        # Tensors come first among the arguments of our own functions.
        for (child, index), each in zip(node.next_functions, made, strict=False):
            if child is None:
                continue
            slots = arrived.setdefault(child, [])
            slots += [None] * (index + 1 - len(slots))
            slots[index] = each if slots[index] is None else slots[index] + each
            uses[child] -= 1
            if not uses[child]:
                ready.append(child)
    return leaves


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
    grads = gradients_by_hand(output, torch.empty_like(output))
    same(grads[weight], weight)
    same(grads[threshold], threshold)
    same(dst.sparse_regularization(threshold), threshold, ())


@every_dtype
def test_linear(dtype):
    for batch in ((), (2,), (2, 3), (0,)):
        input, weight = leaf(*batch, 4, dtype=dtype), leaf(8, 4, dtype=dtype)
        threshold, bias = leaf(8), leaf(8, dtype=dtype)
        output = dst.masked_linear(input, weight, threshold, bias)
        same(output, input, (*batch, 8))
        assert output.is_contiguous()
        grads = gradients_by_hand(output, torch.empty_like(output))
        for argument in (input, weight, threshold, bias):
            same(grads[argument], argument)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution(geometry, fake):
    input, weight = leaf(*geometry.input), leaf(*geometry.weight)
    threshold, bias = leaf(geometry.weight[0]), leaf(geometry.weight[0])
    output = geometry.ours(input, weight, threshold, bias, **geometry.options)
    expected = geometry.torchs(
        torch.empty(geometry.input), torch.empty(geometry.weight), **geometry.options
    )
    same(output, input, expected.shape)
    grads = gradients_by_hand(output, torch.empty_like(output))
    assert grads[input].is_cuda and grads[input].dtype == input.dtype
    for argument in (weight, threshold, bias):
        same(grads[argument], argument)


@pytest.mark.parametrize("spatial", [2, 3])
def test_channels_last(spatial):
    format = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial]
    run = {2: dst.masked_conv2d, 3: dst.masked_conv3d}[spatial]
    input = leaf(2, 4, *[5] * spatial, format=format)
    weight = leaf(6, 4, *[3] * spatial, format=format)
    output = run(input, weight, leaf(6))
    assert output.is_contiguous(memory_format=format)
    grads = gradients_by_hand(output, torch.empty_like(output))
    same(grads[input], input)
    same(grads[weight], weight)


def test_wrong_arguments_are_refused_without_data():
    with pytest.raises(ValueError, match="threshold must have shape"):
        dst.masked_weight(leaf(8, 4), leaf(3))
    with pytest.raises(ValueError, match="device"):
        dst.masked_weight(leaf(8, 4), torch.empty(8))
    with pytest.raises(ValueError, match="bias must have shape"):
        dst.masked_linear(leaf(2, 4), leaf(8, 4), leaf(8), leaf(4))
