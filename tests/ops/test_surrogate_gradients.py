"""Gradients through the mask, against formulas evaluated one number at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

import dst_kernels.functional as dst

from . import authors
from .convolutions import GEOMETRIES
from .tolerance import assert_as_accurate

SURROGATES = tuple(authors.SURROGATES)
GRANULARITIES = ("row", "scalar", "layer", "element")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("each_backend"),
]


def threshold_for(shape, granularity, dtype=torch.float64):
    sizes = {"row": [shape[0]], "scalar": [], "layer": [1], "element": list(shape)}
    return torch.randn(sizes[granularity], dtype=dtype).mul(0.5).requires_grad_()


def close(a, b):
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * scale)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_masked_weight(surrogate):
    for granularity, structure_gradient in itertools.product(GRANULARITIES, (True, False)):
        for shape in ((5, 7), (3, 2, 4), (4, 2, 3, 2), (5, 5)):
            weight = torch.randn(shape, dtype=torch.float64).requires_grad_()
            threshold = threshold_for(shape, granularity)
            grad = torch.randn(shape, dtype=torch.float64)
            output = dst.masked_weight(
                weight, threshold, surrogate=surrogate, structure_gradient=structure_gradient
            )
            output.backward(grad)
            kept = authors.mask(weight, threshold)
            assert torch.equal(output.detach(), weight.detach() * kept)
            of_weight, of_threshold = authors.gradients(
                grad, weight, threshold, surrogate, structure_gradient
            )
            close(weight.grad, of_weight)
            close(threshold.grad, of_threshold)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_masked_linear(surrogate):
    for granularity, structure_gradient in itertools.product(GRANULARITIES, (True, False)):
        weight = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
        threshold = threshold_for(weight.shape, granularity)
        input = torch.randn(2, 3, 6, dtype=torch.float64)
        grad = torch.randn(2, 3, 4, dtype=torch.float64)
        dst.masked_linear(
            input, weight, threshold, surrogate=surrogate, structure_gradient=structure_gradient
        ).backward(grad)
        dense = torch.einsum("abo,abi->oi", grad, input)
        of_weight, of_threshold = authors.gradients(
            dense, weight, threshold, surrogate, structure_gradient
        )
        close(weight.grad, of_weight)
        close(threshold.grad, of_threshold)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_masked_convolution(spatial):
    for geometry in (each for each in GEOMETRIES if each.spatial == spatial):
        for granularity, (surrogate, structure_gradient) in itertools.product(
            GRANULARITIES, (("long_tailed", True), ("triangular", False))
        ):
            weight = torch.randn(geometry.weight, dtype=torch.float64).requires_grad_()
            threshold = threshold_for(weight.shape, granularity)
            input = torch.randn(geometry.input, dtype=torch.float64)
            kernel = (weight.detach() * authors.mask(weight, threshold)).requires_grad_()
            plain = geometry.torchs(input, kernel, **geometry.options)
            grad = torch.randn_like(plain)
            plain.backward(grad)
            geometry.ours(
                input,
                weight,
                threshold,
                **geometry.options,
                surrogate=surrogate,
                structure_gradient=structure_gradient,
            ).backward(grad)
            of_weight, of_threshold = authors.gradients(
                kernel.grad, weight, threshold, surrogate, structure_gradient
            )
            close(weight.grad, of_weight)
            close(threshold.grad, of_threshold)


# By hand: margins and the surrogate's height there, on either side of the threshold.
EDGES = {
    "long_tailed": [
        *((0.0, 2.0), (0.25, 1.0), (0.4, 0.4), (0.5, 0.4), (1.0, 0.4)),
        *((1.0 + 2**-40, 0.0), (3.0, 0.0)),
    ],
    "rectangular": [(0.0, 1.0), (0.5, 1.0), (0.5 + 2**-40, 0.0)],
    "triangular": [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (1.5, 0.0)],
    "straight_through": [(0.0, 1.0), (100.0, 1.0)],
}


@pytest.mark.parametrize("surrogate", EDGES)
def test_edges_of_the_surrogates(surrogate):
    """One weight of magnitude 2 and a threshold at the distance asked for: exact in binary."""
    for (margin, height), side, sign in itertools.product(EDGES[surrogate], (-1, 1), (-1, 1)):
        weight = torch.tensor([[2.0 * sign, 5.0]], dtype=torch.float64, requires_grad=True)
        threshold = torch.tensor(
            [[2.0 - side * margin, -1000.0]], dtype=torch.float64, requires_grad=True
        )
        output = dst.masked_weight(weight, threshold, surrogate=surrogate, reset_ratio=None)
        output[0, 0].backward()
        kept = 1.0 if side * margin > 0 else 0.0
        assert output[0, 0].item() == 2.0 * sign * kept
        assert weight.grad[0, 0].item() == pytest.approx(kept + 2.0 * height, abs=1e-14)
        assert threshold.grad[0, 0].item() == pytest.approx(-2.0 * sign * height, abs=1e-14)


def test_zero_weights_get_no_gradient_and_give_none():
    for zero, structure_gradient in itertools.product((0.0, -0.0), (True, False)):
        weight = torch.tensor([[zero, zero, 1.0]], requires_grad=True)
        threshold = torch.zeros(1, requires_grad=True)
        output = dst.masked_weight(weight, threshold, structure_gradient=structure_gradient)
        output[0, :2].sum().backward()
        assert weight.grad[0, :2].tolist() == [0.0, 0.0]
        assert threshold.grad.item() == 0.0


def test_pruned_weights_move_by_the_structure_gradient_only():
    weight = torch.tensor([[0.1, -0.1, 2.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.2], dtype=torch.float64)
    for structure_gradient, expected in ((True, 0.1 * (2 - 4 * 0.1)), (False, 0.0)):
        weight.grad = None
        output = dst.masked_weight(weight, threshold, structure_gradient=structure_gradient)
        output.sum().backward()
        assert weight.grad[0, :2].tolist() == pytest.approx([expected, expected])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_are_as_accurate_as_plain_pytorch(dtype):
    for granularity in GRANULARITIES:
        weight = torch.randn(16, 24).to(dtype).requires_grad_()
        threshold = threshold_for(weight.shape, granularity, torch.float32)
        input, grad = torch.randn(40, 24).to(dtype), torch.randn(40, 16).to(dtype)
        dst.masked_linear(input, weight, threshold).backward(grad)
        exact = authors.gradients(grad.double().t() @ input.double(), weight, threshold)
        plain = authors.gradients(grad.t() @ input, weight, threshold)
        assert_as_accurate(weight.grad, plain[0].to(dtype), exact[0])
        assert_as_accurate(threshold.grad, plain[1].float(), exact[1])


def test_a_margin_of_exactly_one_lies_inside_the_long_tail():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight = torch.tensor([[1.0, -1.0, 1.5]], dtype=dtype, requires_grad=True)
        threshold = torch.zeros(1, requires_grad=True)
        dst.masked_weight(weight, threshold)[0, :2].sum().backward()
        expected = torch.tensor([1.4, 1.4, 0.0], dtype=dtype)
        assert torch.equal(weight.grad[0], expected)
        dst.masked_weight(weight, threshold)[0, 2].backward()
        assert weight.grad[0, 2].item() == 1.0
