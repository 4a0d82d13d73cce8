"""Transposed convolutions: the formulas with one threshold per output channel, and their errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

import dst_kernels.functional as dst
from dst_kernels import ops, reference
from dst_kernels.nn import MaskedConvTranspose2d
from dst_kernels.reference.conv_transpose import TransposedGeometry

from . import authors
from .backends import BACKENDS
from .convolutions import Geometry
from .tolerance import assert_as_accurate

GEOMETRIES = (
    Geometry("1d", (2, 3, 5), (3, 4, 3)),
    Geometry(
        "1d-all",
        (2, 4, 4),
        (4, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2},
    ),
    Geometry("1d-unbatched", (3, 4), (3, 2, 2), {"stride": 2}),
    Geometry("2d", (2, 3, 3, 4), (3, 4, 2, 3), {"padding": 1}),
    Geometry(
        "2d-all",
        (2, 4, 3, 2),
        (4, 3, 3, 2),
        {
            **{"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 1)},
            **{"groups": 2, "dilation": (1, 2)},
        },
    ),
    Geometry("2d-depthwise", (1, 4, 3, 3), (4, 1, 3, 3), {"stride": 2, "groups": 4}),
    Geometry("2d-one-output", (1, 4, 3, 3), (4, 1, 2, 2)),
    Geometry("3d-all", (1, 4, 2, 2, 2), (4, 2, 1, 2, 2), {"stride": (2, 1, 2), "groups": 2}),
)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
GRANULARITIES = ("row", "scalar", "layer", "element")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def ours_of(geometry):
    return getattr(dst, f"masked_conv_transpose{geometry.spatial}d")


def torchs_of(geometry):
    return getattr(F, f"conv_transpose{geometry.spatial}d")


def outputs_of(geometry):
    return geometry.weight[1] * groups_of(geometry)


def groups_of(geometry):
    return geometry.options.get("groups", 1)


def in_rows(tensor, geometry):
    """With a row for each output channel, as the rule has it; and back again.

    A threshold that is not one for each weight stays what it is.
    """
    return authors.transposed(tensor, groups_of(geometry)) if tensor.dim() > 1 else tensor


def kept(weight, threshold, geometry):
    return in_rows(authors.mask(in_rows(weight, geometry), in_rows(threshold, geometry)), geometry)


def leaves_of(geometry, granularity, device="cpu", dtype=torch.float32):
    sizes = {
        **{"row": [outputs_of(geometry)], "scalar": [], "layer": [1]},
        **{"element": geometry.weight},
    }
    drawn = (
        torch.randn(geometry.input, dtype=torch.float64),
        torch.randn(geometry.weight, dtype=torch.float64),
        0.3 + 0.5 * torch.rand(sizes[granularity], dtype=torch.float64),
        torch.randn(outputs_of(geometry), dtype=torch.float64),
    )
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def dense_output(geometry, input, weight):
    """As a cotangent it makes G * W mostly positive, so that sums of it do not cancel."""
    return torchs_of(geometry)(input.detach(), weight.detach(), **geometry.options)


def results(geometry, leaves, cotangent, **options):
    output = ours_of(geometry)(*leaves, **geometry.options, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def by_formula(geometry, leaves, cotangent, dtype, product_dtype):
    """The method's formulas on the leaves in `dtype`; the product in `product_dtype`."""
    input, weight, threshold, bias = (leaf.detach() for leaf in leaves)
    masked = weight.to(dtype) * kept(weight, threshold, geometry)
    operands = [t.to(product_dtype).requires_grad_() for t in (input, masked, bias)]
    output = torchs_of(geometry)(*operands, **geometry.options)
    cotangent = cotangent.to(output.dtype)
    of_input, dense, of_bias = torch.autograd.grad(output, operands, cotangent)
    of_rows = authors.gradients(*(in_rows(t, geometry) for t in (dense, weight, threshold)))
    of_weight, of_threshold = (in_rows(gradient, geometry) for gradient in of_rows)
    return output.detach(), of_input, of_weight, of_threshold, of_bias


@every_geometry
@every_backend
def test_the_formulas(geometry, backend, device):
    for granularity in GRANULARITIES:
        leaves = leaves_of(geometry, granularity, device)
        cotangent = dense_output(geometry, *leaves[:2])
        ours = results(geometry, leaves, cotangent, backend=backend)
        plain = by_formula(geometry, leaves, cotangent, torch.float32, torch.float32)
        exact = by_formula(geometry, leaves, cotangent, torch.float64, torch.float64)
        for result, close, truth in zip(ours, plain, exact, strict=True):
            assert_as_accurate(result, close.to(device, result.dtype), truth.to(device))


@pytest.mark.parametrize("granularity", ["row", "element"])
@every_backend
def test_under_autocast(granularity, backend, device):
    """Float32 masters and a float16 product."""
    geometry = GEOMETRIES[4]
    leaves = leaves_of(geometry, granularity, device)
    cotangent = dense_output(geometry, *leaves[:2]).half()
    with torch.autocast(device.type, torch.float16):
        ours = results(geometry, leaves, cotangent, backend=backend)
    plain = by_formula(geometry, leaves, cotangent, torch.float32, torch.float16)
    exact = by_formula(geometry, leaves, cotangent, torch.float64, torch.float64)
    assert ours[0].dtype == torch.float16
    for result, close, truth in zip(ours, plain, exact, strict=True):
        assert_as_accurate(result, close.to(device, result.dtype), truth.to(device))


def test_the_mask_is_decided_on_the_master_weight():
    """In bfloat16 the weight would equal its threshold."""
    weight = torch.full((2, 3, 2), 1.0 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        output = dst.masked_conv_transpose1d(torch.ones(1, 2, 2), weight, torch.ones(3))
    assert output.dtype == torch.bfloat16 and bool((output > 0).all())


@every_geometry
def test_the_reference_states_it(geometry):
    options = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    options.update(geometry.options)
    for name in ("stride", "padding", "output_padding", "dilation"):
        if isinstance(options[name], int):
            options[name] = (options[name],) * geometry.spatial
    for granularity, ratio in itertools.product(GRANULARITIES, (None, 1.0)):
        leaves = leaves_of(geometry, granularity, dtype=torch.float64)
        input, weight, threshold, bias = (leaf.detach() for leaf in leaves)
        if len(geometry.input) == len(geometry.weight) - 1:
            input = input[None]
        output, effective = reference.masked_conv_transpose(
            input, weight, threshold, bias, ratio, TransposedGeometry(**options)
        )
        expected = threshold if ratio is None else torch.zeros_like(threshold)
        assert torch.equal(effective, expected) and effective.shape == threshold.shape
        masked = weight * kept(weight, expected, geometry)
        product = torchs_of(geometry)(input, masked, bias, **geometry.options)
        torch.testing.assert_close(output, product, rtol=1e-13, atol=1e-13)


@every_geometry
def test_gradients_against_finite_differences(geometry):
    """Those that are derivatives, with weights away from their thresholds."""
    input, weight, threshold, bias = leaves_of(geometry, "row", dtype=torch.float64)
    shape = in_rows(weight, geometry).shape
    limits = in_rows(authors.spread(threshold.detach(), shape), geometry)
    sides = torch.where(torch.rand(geometry.weight) < 0.5, -0.2, 0.2).double()
    signs = torch.where(torch.rand(geometry.weight) < 0.5, -1.0, 1.0).double()
    weight = (signs * (limits + sides)).requires_grad_()

    def run(input, weight, bias):
        return ours_of(geometry)(
            input, weight, threshold, bias, **geometry.options, structure_gradient=False
        )

    assert gradcheck(run, (input, weight, bias))


def test_masking_moves_no_weight():
    """The ops see the stored weight itself, whatever the groups; one op each way."""
    seen = []
    run = ops.call

    def call(op, *args):
        seen.append((op, [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]))
        return run(op, *args)

    for layer in (MaskedConvTranspose2d(4, 6, 3), MaskedConvTranspose2d(4, 6, 3, groups=2)):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "call", call)
            layer(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
        assert [op for op, _ in seen] == [ops.masked_weight, ops.masked_weight_backward]
        assert all(layer.weight.data_ptr() in pointers for _, pointers in seen)


# -- errors ----------------------------------------------------------------------------------------

INPUT, WEIGHT, THRESHOLD = torch.ones(2, 4, 5), torch.ones(4, 3, 3), torch.zeros(6)


BAD = [
    ({"weight": torch.ones(4, 3)}, r"weight must be \[in, out/groups, \*kernel\] with 1"),
    ({"weight": torch.ones(4, 3, 3).int()}, "weight must be float16"),
    ({"threshold": torch.zeros(3)}, r"threshold must have shape \[6\] .* is \[3\]"),
    ({"threshold": torch.zeros(4)}, r"threshold must have shape \[6\] .* is \[4\]"),
    ({"threshold": torch.zeros(4, 3)}, r"threshold must have shape \[6\] .* is \[4, 3\]"),
    ({"input": torch.ones(2, 6, 5)}, r"input must have 4 channels .* is \[2, 6, 5\]"),
    ({"input": torch.ones(2, 4, 5, 5)}, "input must have 4 channels and 1 spatial"),
    ({"input": INPUT.double()}, "input must have the weight's dtype torch.float32"),
    ({"groups": 3}, "groups must be at least 1 and divide the 4 input channels, but is 3"),
    ({"groups": 0}, "groups must be at least 1"),
    ({"stride": 0}, "stride must be 1 integer"),
    ({"stride": (1, 1)}, "stride must be an integer or 1 integers"),
    ({"padding": -1}, "padding must be 1 integer"),
    ({"padding": "same"}, "padding must be an integer or 1 integers, but is 'same'"),
    ({"padding": 9}, "input is too small: spatial dimension 0 of the output .* -11 elements"),
    ({"output_padding": 1}, "output_padding must be smaller than .* at most 0, but is 1"),
    ({"output_padding": -1}, "output_padding must be 1 integer"),
    ({"dilation": 0}, "dilation must be 1 integer"),
    ({"bias": torch.ones(3)}, r"bias must have shape \[6\], but its shape is \[3\]"),
    ({"surrogate": "none"}, "surrogate must be one of"),
    ({"reset_ratio": 2.0}, "reset_ratio must be between 0 and 1"),
    ({"backend": "none"}, "backend must be one of"),
]


def test_bad_input():
    arguments = {"input": INPUT, "weight": WEIGHT, "threshold": THRESHOLD, "groups": 2}
    assert dst.masked_conv_transpose1d(**arguments).shape == (2, 6, 7)
    for changed, message in BAD:
        with pytest.raises((TypeError, ValueError), match=message):
            dst.masked_conv_transpose1d(**{**arguments, **changed})


@pytest.mark.parametrize("path", ["fused", "mixed"])
def test_layers_refuse_paths_they_do_not_have(path):
    message = (
        f"path must be one of auto, packed, but is '{path}', "
        "since torch multiplies with such weights"
    )
    for run in (
        lambda: MaskedConvTranspose2d(2, 3, 2, path=path),
        lambda: MaskedConvTranspose2d.from_dense(torch.nn.ConvTranspose2d(2, 3, 2), path=path),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    layer = MaskedConvTranspose2d(2, 3, 2)
    with pytest.raises(ValueError, match=message):
        layer.path = path
    assert layer.path == "auto"
    with pytest.raises(ValueError, match=r"auto, packed, but is 'none'$"):
        MaskedConvTranspose2d(2, 3, 2, path="none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_thresholds_are_rounded_once(dtype):
    """Not each of their terms: the sum of these is small."""
    torch.manual_seed(0)
    weight, input = torch.randn(64, 8, 5, 5), torch.randn(2, 64, 6, 6)
    weight.requires_grad_()
    threshold = torch.full((8,), 0.25, dtype=dtype, requires_grad=True)
    wide = threshold.detach().float().requires_grad_()
    for each in (threshold, wide):
        dst.masked_conv_transpose2d(input, weight, each).cos().sum().backward()
    assert torch.equal(threshold.grad, wide.grad.to(dtype))
