"""What is a true derivative, against finite differences in float64.

True are the gradients of input and bias, and that of the weight while no weight crosses its
threshold and the structure gradient is off. Weights stay 0.1 away from a threshold at least.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import dst_kernels.functional as dst

from .convolutions import GEOMETRIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("each_backend"),
]


def weight_and_threshold(shape, granularity="row"):
    """About half of the weights are kept, none is near its threshold."""
    sizes = {"row": [shape[0]], "scalar": [], "layer": [1], "element": list(shape)}
    threshold = 0.5 + 0.2 * torch.rand(sizes[granularity], dtype=torch.float64)
    limits = threshold
    if granularity == "row":
        limits = threshold.reshape(-1, *[1] * (len(shape) - 1))
    kept = torch.rand(shape, dtype=torch.float64) < 0.5
    kept.view(-1)[0] = True
    offset = 0.1 + 0.3 * torch.rand(shape, dtype=torch.float64)
    magnitude = torch.where(kept, limits + offset, limits - offset)
    sign = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0).double()
    return (sign * magnitude).requires_grad_(), threshold


@pytest.mark.parametrize("granularity", ["row", "scalar", "layer", "element"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_linear(granularity, bias, batch):
    weight, threshold = weight_and_threshold((4, 5), granularity)
    input = torch.randn(*batch, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None

    def run(input, weight, bias):
        return dst.masked_linear(input, weight, threshold, bias, structure_gradient=False)

    assert gradcheck(run, (input, weight, bias))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution(geometry):
    """Its output is torch's with the masked weight."""
    weight, threshold = weight_and_threshold(geometry.weight)
    input = torch.randn(geometry.input, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(geometry.weight[0], dtype=torch.float64, requires_grad=True)

    def run(input, weight, bias):
        return geometry.ours(
            input, weight, threshold, bias, **geometry.options, structure_gradient=False
        )

    kept = weight.abs() > threshold.reshape(-1, *[1] * (weight.dim() - 1))
    assert 0 < kept.sum() < kept.numel()
    expected = geometry.torchs(input, weight * kept, bias, **geometry.options)
    torch.testing.assert_close(run(input, weight, bias), expected, rtol=1e-13, atol=1e-14)
    assert gradcheck(run, (input, weight, bias))


@pytest.mark.parametrize("granularity", ["row", "scalar", "layer", "element"])
def test_masked_weight(granularity):
    weight, threshold = weight_and_threshold((3, 4, 2), granularity)

    def run(weight):
        return dst.masked_weight(weight, threshold, structure_gradient=False)

    assert gradcheck(run, (weight,))


def test_input_and_bias_gradients_do_not_depend_on_the_structure_gradient():
    weight, threshold = weight_and_threshold((4, 5))
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for surrogate in ("long_tailed", "rectangular", "triangular", "straight_through"):
        assert gradcheck(
            lambda x, b, s=surrogate: dst.masked_linear(x, weight, threshold, b, surrogate=s),
            (input, bias),
        )
