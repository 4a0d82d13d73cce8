"""Sizes of zero, strided arguments and memory formats."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import dst_kernels.functional as dst

pytestmark = pytest.mark.usefixtures("each_backend")

CONV = {1: dst.masked_conv1d, 2: dst.masked_conv2d, 3: dst.masked_conv3d}
TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def leaves(*shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def check_against_torch(ours, torchs, input, weight, threshold, bias):
    """Shapes and values of the output and every gradient, with all thresholds below zero."""
    with torch.no_grad():
        threshold.fill_(-10.0)  # keeps everything; H is zero this far away
    plain = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    expected = torchs(*plain)
    result = ours(input, weight, threshold, bias)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected)
    expected.sum().backward()
    result.sum().backward()
    for leaf, twin in zip((input, weight, bias), plain, strict=True):
        assert leaf.grad.shape == leaf.shape
        torch.testing.assert_close(leaf.grad, twin.grad)
    assert torch.equal(threshold.grad, torch.zeros_like(threshold))


@pytest.mark.parametrize(("rows", "columns"), [(4, 3), (0, 3), (4, 0), (0, 0), (1, 1)])
def test_linear(rows, columns):
    batches = [(), (2,), (0,), (2, 0), (0, 3), (2, 3)]
    for batch, shape in itertools.product(batches, ([rows], [], [1], [rows, columns])):
        input, weight, threshold, bias = leaves((*batch, columns), (rows, columns), shape, (rows,))
        check_against_torch(dst.masked_linear, F.linear, input, weight, threshold, bias)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolution_of_an_empty_batch(spatial):
    sizes, kernel = [4] * spatial, [3] * spatial
    input, weight, threshold, bias = leaves((0, 3, *sizes), (5, 3, *kernel), [5], [5])
    check_against_torch(CONV[spatial], TORCH[spatial], input, weight, threshold, bias)


def test_masked_weight_without_elements():
    for shape in ((0, 3), (3, 0), (0, 0), (0, 2, 3), (2, 0, 3), (2, 3, 0)):
        for sizes in ([shape[0]], [], [1], shape):
            weight, threshold = leaves(shape, sizes)
            output = dst.masked_weight(weight, threshold)
            assert output.shape == weight.shape
            output.sum().backward()
            assert weight.grad.shape == weight.shape
            assert torch.equal(threshold.grad, torch.zeros_like(threshold))
            assert dst.threshold_mask(weight, threshold).shape == weight.shape
            assert dst.remaining_ratio(weight, threshold).isnan()
            effective = dst.effective_threshold(weight, threshold)
            assert torch.equal(effective, threshold), "without weights there is nothing to collapse"


def strided(tensor):
    return tensor.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()


def transposed(tensor):
    return tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("arrange", [strided, transposed])
def test_strided_arguments_give_the_same_numbers(arrange):
    input, weight, threshold = leaves((6, 4, 5, 5), (8, 4, 3, 3), (8, 4, 3, 3))
    with torch.no_grad():
        threshold.abs_()
    moved = [arrange(t) for t in (input, weight, threshold)]
    assert not any(t.is_contiguous() for t in moved)
    grads = []
    for arguments in ((input, weight, threshold), moved):
        output = dst.masked_conv2d(*arguments, padding=1)
        cotangent = arrange(torch.linspace(-1, 1, output.numel()).view_as(output))
        grads.append((output, *torch.autograd.grad(output, arguments, cotangent.detach())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arrange", [strided, transposed])
def test_linear_with_strided_arguments(arrange):
    input, weight, threshold = leaves((6, 4), (8, 4), (8, 4))
    moved = [arrange(t) for t in (input, weight, threshold)]
    results = []
    for arguments in ((input, weight, threshold), moved):
        output = dst.masked_linear(*arguments)
        results.append((output, *torch.autograd.grad(output.sin().sum(), arguments)))
    torch.testing.assert_close(results[0], results[1])


def test_expanded_gradient():
    """`output.sum().backward()` hands in a gradient whose strides are all zero."""
    input, weight, threshold = leaves((3, 4), (5, 4), (5,))
    output = dst.masked_linear(input, weight, threshold)
    expanded = torch.autograd.grad(output.sum(), (input, weight, threshold), retain_graph=True)
    dense = torch.autograd.grad(output, (input, weight, threshold), torch.ones(3, 5))
    torch.testing.assert_close(expanded, dense)


FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("spatial", [2, 3])
def test_channels_last_stays_channels_last(spatial):
    format = FORMATS[spatial]
    for which in ("input", "weight", "both"):
        input, weight = torch.randn(2, 4, *[5] * spatial), torch.randn(6, 4, *[3] * spatial)
        if which in ("input", "both"):
            input = input.contiguous(memory_format=format)
        if which in ("weight", "both"):
            weight = weight.contiguous(memory_format=format)
        input, weight = input.requires_grad_(), weight.requires_grad_()
        output = CONV[spatial](input, weight, torch.rand(6), padding=1, groups=1)
        assert output.is_contiguous(memory_format=format)
        of_input, of_weight = torch.autograd.grad(output, (input, weight), torch.randn_like(output))
        assert of_input.is_contiguous(memory_format=format)
        assert of_weight.stride() == weight.stride()
        masked = dst.masked_weight(weight, torch.rand(6))
        assert masked.stride() == weight.stride()


@pytest.mark.parametrize("spatial", [2, 3])
def test_contiguous_stays_contiguous(spatial):
    input, weight = leaves((2, 4, *[5] * spatial), (6, 4, *[3] * spatial))
    output = CONV[spatial](input, weight, torch.rand(6), stride=2)
    of_input, of_weight = torch.autograd.grad(output.sum(), (input, weight))
    assert output.is_contiguous() and of_input.is_contiguous() and of_weight.is_contiguous()


def test_unbatched_convolution_equals_a_batch_of_one():
    for spatial in (1, 2, 3):
        input, weight = torch.randn(4, *[5] * spatial), torch.randn(6, 4, *[3] * spatial)
        single = CONV[spatial](input, weight, torch.rand(6), padding="same")
        assert single.shape == (6, *[5] * spatial)


def test_row_threshold_of_a_single_row_and_layer_threshold_agree():
    weight = torch.randn(1, 8)
    threshold = torch.tensor([0.5])
    assert torch.equal(
        dst.masked_weight(weight, threshold), dst.masked_weight(weight, threshold.squeeze())
    )
