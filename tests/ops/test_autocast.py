"""Autocast: masks in the parameters' own dtypes, the product in the autocast dtype."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import dst_kernels.functional as dst

from . import authors
from .tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("each_backend")


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast("cpu", dtype, **options)


def masked_linear(weight, threshold):
    identity = torch.eye(weight.shape[1])
    return dst.masked_linear(identity, weight, threshold).t()


def masked_conv(weight, threshold):
    if threshold.dim() == 2:
        threshold = threshold[..., None, None]
    identity = torch.eye(weight.shape[1])[..., None, None]
    return dst.masked_conv2d(identity, weight[..., None, None], threshold)[..., 0, 0].t()


@pytest.mark.parametrize("op", [masked_linear, masked_conv, dst.masked_weight])
@pytest.mark.parametrize(
    ("magnitude", "threshold", "kept"),
    [
        (0.5004, 0.5002, True),  # both round to 0.5, which would prune
        (0.5004, 0.5 + 2**-20, True),
        (0.5002, 0.5004, False),
        (0.4999, 0.49985, True),  # a rounded threshold, 0.5, would prune
        (0.49985, 0.4999, False),  # a rounded weight, 0.5, would be kept
    ],
)
def test_comparison_is_made_before_rounding(op, magnitude, threshold, kept):
    for shape in ([], [1], [2], [2, 2]):
        weight = torch.tensor([[magnitude, 3.0], [-magnitude, -3.0]], requires_grad=True)
        limit = torch.full(shape, threshold)
        assert bool((weight.detach()[:, 0].bfloat16().abs() == 0.5).all())
        with autocast():
            output = op(weight, limit)
        assert (output[:, 0] != 0).tolist() == [kept, kept]
        grad = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        output.backward(grad.to(output.dtype))
        of_weight, _ = authors.gradients(grad, weight, limit)
        assert weight.grad[:, 0].tolist() == pytest.approx(of_weight[:, 0].tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_dtypes(dtype, input_dtype):
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4, requires_grad=True)
    threshold = torch.rand(4, requires_grad=True)
    input = torch.randn(3, 6, dtype=input_dtype, requires_grad=True)
    with autocast(dtype):
        output = dst.masked_linear(input, weight, threshold, bias)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    for leaf in (input, weight, threshold, bias):
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all() and leaf.grad.any()


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolution_dtypes(spatial):
    op = (dst.masked_conv1d, dst.masked_conv2d, dst.masked_conv3d)[spatial - 1]
    weight = torch.randn(4, 2, *[3] * spatial, requires_grad=True)
    bias, threshold = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    input = torch.randn(2, 2, *[5] * spatial, requires_grad=True)
    with autocast():
        output = op(input, weight, threshold, bias, padding=1)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for leaf in (input, weight, threshold, bias):
        assert leaf.grad.dtype == torch.float32 and leaf.grad.any()


def test_float64_is_left_alone_as_torch_does():
    weight, threshold = torch.randn(4, 6, dtype=torch.float64), torch.rand(4)
    input = torch.randn(3, 6, dtype=torch.float64)
    with autocast():
        assert dst.masked_linear(input, weight, threshold).dtype == torch.float64
        assert F.linear(input, weight).dtype == torch.float64


def test_masked_weight_and_regulariser_keep_their_dtypes():
    weight, threshold = torch.randn(4, 6), torch.rand(4)
    with autocast():
        assert dst.masked_weight(weight, threshold).dtype == torch.float32
        assert torch.equal(
            dst.masked_weight(weight, threshold, dtype=torch.bfloat16),
            (weight * authors.mask(weight, threshold)).bfloat16(),
        )
        assert dst.sparse_regularization(threshold).dtype == torch.float32
        assert dst.effective_threshold(weight, threshold).dtype == torch.float32


def test_backward_inside_the_autocast_region_gives_the_same_gradients():
    weight, threshold = torch.randn(4, 6, requires_grad=True), torch.rand(4, requires_grad=True)
    input = torch.randn(3, 6, requires_grad=True)
    leaves = (input, weight, threshold)
    with autocast():
        loss = dst.masked_linear(*leaves).float().square().sum()
        inside = torch.autograd.grad(loss, leaves, retain_graph=True)
    outside = torch.autograd.grad(loss, leaves)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_disabled_inner_region_checks_dtypes_again():
    weight, threshold = torch.randn(4, 6), torch.rand(4)
    with autocast(), autocast(enabled=False):
        assert dst.masked_linear(torch.randn(3, 6), weight, threshold).dtype == torch.float32
        with pytest.raises(TypeError, match="outside autocast"):
            dst.masked_linear(torch.randn(3, 6).bfloat16(), weight, threshold)


def test_as_accurate_as_torch_under_autocast():
    weight, bias = torch.randn(16, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    threshold = (0.7 * torch.rand(16)).requires_grad_()
    input = torch.randn(24, 32, requires_grad=True)
    cotangent = torch.randn(24, 16).bfloat16()
    with autocast():
        output = dst.masked_linear(input, weight, threshold, bias)
    results = (output, *torch.autograd.grad(output, (input, weight, threshold, bias), cotangent))

    def plain(cast, autocasts):
        kernel = cast(weight.detach()) * authors.mask(weight, threshold)
        leaves = [cast(t.detach()).requires_grad_() for t in (input, kernel, bias)]
        with autocast(enabled=autocasts):
            output = F.linear(*leaves)
        of_input, dense, of_bias = torch.autograd.grad(output, leaves, cotangent.to(output.dtype))
        of_weight, of_threshold = authors.gradients(dense, weight, threshold)
        return output, of_input, of_weight, of_threshold, of_bias

    exact = plain(torch.Tensor.double, False)
    for result, close, truth in zip(results, plain(lambda t: t, True), exact, strict=True):
        assert_as_accurate(result.detach(), close.detach().to(result.dtype), truth.detach())


@pytest.mark.parametrize("path", ["packed", "fused"])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_bfloat16_bias_under_float16_autocast_gets_a_sum_in_float32(path, convolution):
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    weight, input, grad = torch.ones(2, 3), torch.ones(300, 3), torch.full((300, 2), 1 + 2**-8)
    if convolution:
        weight, input, grad = weight[..., None], input[..., None], grad[..., None]
    run = dst.masked_conv1d if convolution else dst.masked_linear
    options = {"path": path, "backend": "reference"}
    with autocast(torch.float16):
        output = run(input, weight, torch.zeros(2), bias, **options)
    output.backward(grad.half())
    # Each addend in bfloat16 would be 1, and the sum 300.
    assert torch.equal(bias.grad, torch.full((2,), 300 * (1 + 2**-8)).half().bfloat16())
