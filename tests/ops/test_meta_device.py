"""Meta tensors: shapes and errors without memory, as models are laid out before loading."""

from __future__ import annotations

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels.nn import MaskedConv2d, MaskedLinear


def meta(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def test_ops_on_weights():
    weight, threshold = meta(4, 3), meta(4)
    assert dst.effective_threshold(weight, threshold).shape == (4,)
    assert dst.threshold_mask(weight, threshold).dtype == torch.bool
    assert dst.remaining_ratio(weight, threshold).shape == ()
    dst.masked_weight(weight, threshold).sum().backward()
    assert weight.grad.shape == (4, 3) and threshold.grad.is_meta


def test_linear():
    leaves = meta(2, 3), meta(4, 3), meta(4), meta(4)
    output = dst.masked_linear(*leaves)
    assert output.is_meta and output.shape == (2, 4)
    output.sum().backward()
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_convolution():
    leaves = meta(2, 3, 6, 6), meta(4, 3, 3, 3), meta(4), meta(4)
    output = dst.masked_conv2d(*leaves, stride=2)
    assert output.is_meta and output.shape == (2, 4, 2, 2)
    output.sum().backward()
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("training", [True, False])
def test_layers(training):
    with torch.device("meta"):
        linear, conv = MaskedLinear(3, 4).train(training), MaskedConv2d(3, 4, 3).train(training)
        assert linear(torch.randn(2, 3)).shape == (2, 4)
        assert conv(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="threshold must have shape"):
        dst.masked_weight(meta(4, 3), meta(3))
    with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., 3\]"):
        dst.masked_linear(meta(2, 5), meta(4, 3), meta(4))
