"""Values and gradients over drawn shapes, strides, dtypes and ties; arguments stay untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dst_kernels.functional as dst

from . import authors
from .strategies import LAYOUTS, arrange, tensors, weights_and_thresholds
from .tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("each_backend")

RESET_RATIOS = st.sampled_from([None, 0.0, 0.01, 0.5, 1.0])
CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
OURS = {1: dst.masked_conv1d, 2: dst.masked_conv2d, 3: dst.masked_conv3d}


class Untouched:
    """Fails where a tensor was written to, in value or in version."""

    def __init__(self, *tensors):
        self.tensors = [t for t in tensors if t is not None]
        self.before = [(t.detach().clone(), t._version) for t in self.tensors]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            for tensor, (value, version) in zip(self.tensors, self.before, strict=True):
                assert tensor._version == version
                same = torch.equal(tensor.detach(), value)
                assert same or bool(value.isnan().any()), "an argument was written to"


@settings(max_examples=150)
@given(weights_and_thresholds(), RESET_RATIOS)
def test_mask_ratio_and_masked_weight(pair, reset_ratio):
    weight, threshold = pair
    with Untouched(weight, threshold):
        effective = dst.effective_threshold(weight, threshold, reset_ratio=reset_ratio)
        mask = dst.threshold_mask(weight, threshold, reset_ratio=reset_ratio)
        ratio = dst.remaining_ratio(weight, threshold, reset_ratio=reset_ratio)
        output = dst.masked_weight(weight, threshold, reset_ratio=reset_ratio)
    expected = authors.effective(weight, threshold, reset_ratio)
    assert effective.dtype == threshold.dtype and torch.equal(effective, expected)
    assert effective.numel() == 0 or effective.data_ptr() != threshold.data_ptr()
    kept = authors.mask(weight, expected)
    assert mask.dtype == torch.bool and torch.equal(mask, kept)
    assert ratio.shape == () and ratio.dtype == torch.float32
    if weight.numel():
        assert ratio.item() == pytest.approx(int(kept.sum()) / weight.numel(), rel=1e-6)
    else:
        assert ratio.isnan()
    assert output.dtype == weight.dtype
    assert torch.equal(output, torch.where(kept, weight, torch.zeros_like(weight)))


@settings(max_examples=100)
@given(weights_and_thresholds(), st.booleans(), st.data())
def test_gradients_of_the_masked_weight(pair, structure_gradient, data):
    weight, threshold = (t.detach().requires_grad_() for t in pair)
    grad = data.draw(tensors(weight.shape, dtype=weight.dtype))
    with Untouched(weight, threshold, grad):
        dst.masked_weight(
            weight, threshold, reset_ratio=None, structure_gradient=structure_gradient
        ).backward(grad)
    assert weight.grad.dtype == weight.dtype and threshold.grad.dtype == threshold.dtype
    of_weight, of_threshold = authors.gradients(
        grad, weight, threshold, "long_tailed", structure_gradient
    )
    assert_as_accurate(weight.grad, of_weight.to(weight.dtype), of_weight)
    _, size = authors.gradients(grad.abs(), weight.abs(), threshold, "long_tailed", False)
    assert_as_accurate(threshold.grad, of_threshold.to(threshold.dtype), of_threshold, size)


def plain_results(function, input, weight, threshold, bias, grad):
    """(output, input's, weight's, threshold's, bias's gradient) of the dense op on weight * mask.

    The dense op runs in the dtype of its arguments; the formulas on top of it are exact.
    """
    kernel = torch.where(
        authors.mask(weight, threshold), weight.detach(), torch.zeros_like(weight.detach())
    )
    # As they lie in memory, which decides how torch multiplies.
    leaves = [t.detach().requires_grad_() for t in (input, kernel, bias)]
    output = function(*leaves)
    output.backward(grad)
    of_weight, of_threshold = authors.gradients(leaves[1].grad, weight, threshold)
    return (
        output.detach(),
        leaves[0].grad,
        of_weight.to(weight.dtype),
        of_threshold.to(threshold.dtype),
        leaves[2].grad,
    )


def compare_with_plain(ours, plain, input, weight, threshold, bias, data):
    leaves = [t.detach().requires_grad_() for t in (input, weight, threshold, bias)]
    output = ours(*leaves)
    grad = data.draw(tensors(output.shape, dtype=output.dtype))
    with Untouched(*leaves, grad):
        ours(*leaves).backward(grad)
    doubles = [t.detach().double() for t in (input, weight, threshold, bias)]
    exact = plain_results(plain, *doubles, grad.double())
    expected = plain_results(plain, input, weight, threshold, bias, grad)
    x, w, t, b = doubles
    sizes = plain_results(plain, x.abs(), w.abs(), t, b.abs(), grad.double().abs())
    results = (output.detach(), *(leaf.grad for leaf in leaves))
    for result, close, truth, size in zip(results, expected, exact, sizes, strict=True):
        assert_as_accurate(result, close, truth, size)


@settings(max_examples=100)
@given(st.data(), st.integers(0, 4), st.integers(1, 6), st.integers(1, 6))
def test_linear(data, batch, rows, columns):
    weight, threshold = data.draw(weights_and_thresholds(st.just([rows, columns])))
    input = data.draw(tensors([batch, 2, columns], dtype=weight.dtype))
    bias = data.draw(tensors([rows], dtype=weight.dtype))
    compare_with_plain(
        lambda x, w, t, b: dst.masked_linear(x, w, t, b, reset_ratio=None),
        torch.nn.functional.linear,
        input,
        weight,
        threshold,
        bias,
        data,
    )


@settings(max_examples=80)
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_convolution(data, spatial, groups, channels):
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial))
    rows = groups * data.draw(st.integers(1, 3))
    weight, threshold = data.draw(weights_and_thresholds(st.just([rows, channels, *kernel])))
    sizes = data.draw(st.lists(st.integers(5, 7), min_size=spatial, max_size=spatial))
    batch = data.draw(st.integers(1, 2))
    input = data.draw(tensors([batch, groups * channels, *sizes], dtype=weight.dtype))
    bias = data.draw(tensors([rows], dtype=weight.dtype))
    geometry = {
        "stride": data.draw(st.integers(1, 3)),
        "padding": data.draw(st.integers(0, 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "groups": groups,
    }
    compare_with_plain(
        lambda x, w, t, b: OURS[spatial](x, w, t, b, **geometry, reset_ratio=None),
        lambda x, w, b: CONV[spatial](x, w, b, **geometry),
        input,
        weight,
        threshold,
        bias,
        data,
    )


def test_layout_of_the_weight_does_not_change_the_result():
    for layout in LAYOUTS:
        weight = arrange(torch.randn(6, 4, 3, 3), layout)
        threshold, input = torch.rand(6), torch.randn(2, 4, 5, 5)
        copies = weight.clone(memory_format=torch.contiguous_format)
        results = []
        for leaf in (weight, copies):
            leaf = leaf.detach().requires_grad_()
            output = dst.masked_conv2d(input, leaf, threshold)
            output.sum().backward()
            results.append((output.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
