"""Convolutions with kept rows in C++: as exact as torch's, for any number of threads."""

from __future__ import annotations

import re

import pytest
import torch
from cpu_cases import needs_library
from torch.nn import functional as F

from dst_kernels import reference
from dst_kernels.backends import implementation
from dst_kernels.reference.conv import Geometry, convolution_backward

pytestmark = needs_library

GEOMETRIES = [  # kernel, stride, padding, dilation, groups
    ((1, 1), (1, 1), (0, 0), (1, 1), 1), ((3, 3), (1, 1), (0, 0), (1, 1), 1),
    ((3, 3), (1, 1), (1, 1), (1, 1), 2), ((1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((3, 2), (2, 3), (1, 2), (1, 1), 4), ((3, 3), (1, 2), (4, 0), (2, 3), 1),
    ((5, 3), (4, 6), (2, 7), (2, 4), 2), ((7, 7), (2, 2), (3, 3), (1, 1), 1),
    ((2, 2), (3, 4), (2, 1), (1, 1), 8), ((5,), (2,), (3,), (1,), 1), ((3,), (1,), (9,), (2,), 2),
]  # fmt: skip


def kept(name):
    return implementation("cpu", torch.device("cpu"), name)


def new_weight(shape, share, dtype):
    weight = torch.randn(shape) * (torch.rand(shape) < share)
    weight[len(weight) // 3 : len(weight) // 2] = 0
    return weight.to(dtype)


def products(input, grad, weight, bias, geometry):
    """Return output, dX, and dW where the weight is not 0."""
    rows, kernel = kept("kept_rows")(weight, weight.numel()), weight.shape[2:]
    where = reference.kept_places(weight != 0)
    return [
        kept("kept_conv")(input, rows, bias, kernel, geometry),
        kept("kept_conv_grad_input")(grad, input, rows, kernel, geometry),
        kept("kept_conv_grad_weight")(grad, input, where, kernel, geometry),
    ]


def gradients_of_torch(grad, input, weight, geometry):
    of_weight = convolution_backward(grad, input, weight, geometry, 1)
    return convolution_backward(grad, input, weight, geometry, 0), of_weight[weight != 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", GEOMETRIES, ids=str)
def test_errors_are_at_most_twice_torchs(numbers, dtype):
    kernel, geometry = numbers[0], Geometry(*numbers[1:])
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d
    smallest = [step * (size - 1) + 1 for step, size in zip(geometry.dilation, kernel, strict=True)]
    for size in (smallest, (9, 7), (14, 21), (30, 33)):
        size = [max(each) for each in zip(size, smallest, strict=False)]
        for images in (1, 3, 19):
            input = torch.randn(images, 8, *size).to(dtype)
            bias = None if images == 3 else torch.randn(16)
            weight = new_weight((16, 8 // geometry.groups, *kernel), 0.3, dtype)
            wide = [None if each is None else each.double() for each in (input, weight, bias)]
            exact = convolve(*wide, *geometry)
            grad = torch.randn_like(exact).to(dtype)
            exact = exact, *gradients_of_torch(grad.double(), *wide[:2], geometry)
            of_torch = (
                convolve(input, weight, None if bias is None else bias.to(dtype), *geometry),
                *gradients_of_torch(grad, input, weight, geometry),
            )
            found = products(input, grad, weight, bias, geometry)
            for right, plain, each in zip(exact, of_torch, found, strict=True):
                assert each.dtype == dtype and each.shape == right.shape and each.is_contiguous()
                errors = [(other - right).square().mean().sqrt() for other in (each, plain)]
                rounding = torch.finfo(dtype).eps * right.square().mean().sqrt()
                assert errors[0] <= 2 * errors[1] + rounding / 4


def test_any_number_of_threads_gives_the_same_bits():
    before, outputs = torch.get_num_threads(), []
    cases = []
    for shape, size, geometry in (
        ((64, 32, 3, 3), (20, 20), Geometry((1, 1), (1, 1), (1, 1), 1)),
        ((64, 16, 3, 3), (9, 11), Geometry((2, 2), (1, 1), (1, 1), 2)),
        ((256, 32, 1, 1), (4, 4), Geometry((1, 1), (0, 0), (1, 1), 1)),
    ):
        weight = new_weight(shape, 0.2, torch.float32)
        for images in (1, 13):
            input = torch.randn(images, 32, *size)
            grad = torch.randn(geometry.output_shape(input.shape, shape))
            cases.append((input, grad, weight, None, geometry))
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            outputs.append([each for case in cases for each in products(*case)])
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(map(torch.equal, others, outputs[0]))


def test_elements_that_are_not_kept_have_no_part_and_layouts_are_torchs():
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    weight = new_weight((4, 2, 3, 3), 0.5, torch.float32)
    weight[:, 0] = 0
    input = torch.randn(2, 2, 5, 6).contiguous(memory_format=torch.channels_last)
    input[:, 0] = torch.nan
    grad = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    grad[:, 1] = torch.inf  # a row without weights
    output, of_input, of_weight = products(input, grad, weight, None, geometry)
    assert all(each.isfinite().all() for each in (output, of_input, of_weight))
    assert output.is_contiguous(memory_format=torch.channels_last) and of_input.is_contiguous()
    rows = kept("kept_rows")(weight, weight.numel())
    torch.testing.assert_close(output, reference.kept_conv(input, rows, None, (3, 3), geometry))


@pytest.mark.parametrize("images", [1, 8, 9])
def test_what_lies_between_two_lines_has_no_part_in_the_gradient(images):
    geometry, mask = Geometry((1, 1), (0, 0), (1, 1), 1), torch.ones(1, 1, 1, 3, dtype=torch.bool)
    input, grad = torch.randn(images, 1, 3, 7), torch.ones(images, 1, 3, 5)
    input[..., 0] = torch.inf  # is read by the first tap alone
    where = reference.kept_places(mask)
    found = kept("kept_conv_grad_weight")(grad, input, where, (1, 3), geometry)
    torch.testing.assert_close(found, input.sum((0, 1, 2)).unfold(0, 5, 1).sum(1))
    assert found.isfinite().tolist() == [False, True, True]


def test_no_images_and_no_weights_give_no_gradient():
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    for images, mask in ((0, torch.ones), (2, torch.zeros)):
        where = reference.kept_places(mask(2, 3, 1, 1, dtype=torch.bool))
        grad, input = torch.randn(images, 2, 4, 4), torch.randn(images, 3, 4, 4)
        found = kept("kept_conv_grad_weight")(grad, input, where, (1, 1), geometry)
        assert torch.equal(found, torch.zeros(where.kept))


def test_rows_for_another_number_of_channels_are_refused():
    weight = torch.randn(4, 2, 3, 3)
    rows = kept("kept_rows")(weight, weight.numel())
    geometry, kernel = Geometry((1, 1), (1, 1), (1, 1), 1), (3, 3)
    where = reference.kept_places(weight != 0)
    said = re.escape("for 3 channels, columns must be [4, 27]")
    with pytest.raises(RuntimeError, match=said):
        kept("kept_conv")(torch.randn(1, 3, 5, 5), rows, None, kernel, geometry)
    with pytest.raises(RuntimeError, match=said):
        grad, like = torch.randn(1, 4, 5, 5), torch.randn(1, 3, 5, 5)
        kept("kept_conv_grad_input")(grad, like, rows, kernel, geometry)
    with pytest.raises(RuntimeError, match=said):
        kept("kept_conv_grad_weight")(grad, like, where, kernel, geometry)
    with pytest.raises(RuntimeError, match=re.escape("grad must be [N, 4, 5, 5]")):
        grad, like = torch.randn(1, 4, 6, 5), torch.randn(1, 2, 5, 5)
        kept("kept_conv_grad_input")(grad, like, rows, kernel, geometry)
    with pytest.raises(RuntimeError, match=re.escape("grad must be [1, 4, 5, 5]")):
        kept("kept_conv_grad_weight")(grad, like, where, kernel, geometry)
