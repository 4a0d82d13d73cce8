"""Wrong arguments: the type of the error, and a message naming argument, given and accepted.

The ops check them before a backend is chosen.
"""

from __future__ import annotations

import re

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels.nn import MaskedLinear

WEIGHT_OPS = [
    dst.effective_threshold,
    dst.threshold_mask,
    dst.remaining_ratio,
    dst.masked_weight,
    lambda weight, threshold: dst.masked_linear(torch.randn(2, 3), weight, threshold),
    lambda weight, threshold: dst.masked_conv1d(
        torch.randn(2, 3, 5), weight.unsqueeze(-1) if weight.dim() == 2 else weight, threshold
    ),
]
every_weight_op = pytest.mark.parametrize("op", WEIGHT_OPS)
DTYPES = "float16, bfloat16, float32 or float64"


def refuses(error, *parts):
    """Expect `error` with all `parts` in its message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@every_weight_op
def test_dtype_of_weight_and_threshold(op):
    weight, threshold = torch.ones(4, 3), torch.zeros(4)
    for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64):
        with refuses(TypeError, "weight must be", DTYPES, str(dtype)):
            op(weight.to(dtype), threshold)
        with refuses(TypeError, "threshold must be", DTYPES, str(dtype)):
            op(weight, threshold.to(dtype))


@every_weight_op
def test_shape_of_threshold(op):
    accepted = ("[4] (one per row)", "[] or [1] (one per layer)", "(one per weight)")
    for shape in ([3], [5], [2, 2], [4, 1, 1], [1, 1, 1], [0]):
        with refuses(ValueError, "threshold must have shape", *accepted, f"its shape is {shape}"):
            op(torch.ones(4, 3), torch.zeros(shape))


@pytest.mark.parametrize("shape", [[], [3]])
def test_weight_needs_two_dimensions(shape):
    for op in WEIGHT_OPS[:4]:
        with refuses(ValueError, "weight must have at least 2 dimensions", f"is {shape}"):
            op(torch.ones(shape), torch.zeros([]))


@every_weight_op
def test_device_of_threshold(op):
    with refuses(ValueError, "threshold must be on the weight's device cpu", "it is on meta"):
        op(torch.ones(4, 3), torch.zeros(4, device="meta"))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 2, float("nan"), float("inf")])
def test_reset_ratio(ratio):
    accepted = "reset_ratio must be between 0 and 1, or None for no guard"
    for op in WEIGHT_OPS[:4]:
        with refuses(ValueError, accepted, f"is {float(ratio)}"):
            op(torch.ones(4, 3), torch.zeros(4), reset_ratio=ratio)
    with refuses(ValueError, accepted):
        MaskedLinear(3, 4, reset_ratio=ratio)


def test_surrogate():
    accepted = "surrogate must be one of long_tailed, rectangular, triangular, straight_through"
    weight, threshold = torch.ones(4, 3), torch.zeros(4)
    runs = [
        lambda: dst.masked_weight(weight, threshold, surrogate="relu"),
        lambda: dst.masked_linear(torch.ones(3), weight, threshold, surrogate="relu"),
        lambda: dst.masked_conv1d(
            torch.ones(1, 3, 2), weight[..., None], threshold, surrogate="relu"
        ),
    ]
    for run in runs:
        with refuses(ValueError, accepted, "'relu'"):
            run()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_dtype_argument_of_masked_weight(dtype):
    with refuses(TypeError, "dtype must be", DTYPES, str(dtype)):
        dst.masked_weight(torch.ones(4, 3), torch.zeros(4), dtype=dtype)


def linear(**changes):
    arguments = {
        "input": torch.ones(2, 3),
        "weight": torch.ones(4, 3),
        "threshold": torch.zeros(4),
        "bias": torch.zeros(4),
    }
    return dst.masked_linear(**(arguments | changes))


def test_linear_accepts_what_the_cases_below_change():
    assert linear().shape == (2, 4)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"input": torch.ones(2, 5)}, ValueError, ("input must have shape [..., 3]", "[2, 5]")),
        ({"input": torch.tensor(1.0)}, ValueError, ("input must have shape [..., 3]", "is []")),
        (
            {"input": torch.ones(2, 3).int()},
            TypeError,
            ("input must be", DTYPES, "torch.int32"),
        ),
        (
            {"input": torch.ones(2, 3, dtype=torch.complex64)},
            TypeError,
            ("input must", "complex64"),
        ),
        (
            {"input": torch.ones(2, 3).double()},
            TypeError,
            ("input must have the weight's dtype torch.float32 outside autocast", "float64"),
        ),
        (
            {"input": torch.ones(2, 3).bfloat16()},
            TypeError,
            ("input must have the weight's dtype torch.float32 outside autocast", "bfloat16"),
        ),
        (
            {"input": torch.ones(2, 3, device="meta")},
            ValueError,
            ("input must be on the weight's device cpu", "meta"),
        ),
        (
            {"weight": torch.ones(4, 3, 1)},
            ValueError,
            ("weight must be [out, in] for a linear layer", "[4, 3, 1]"),
        ),
        ({"bias": torch.zeros(3)}, ValueError, ("bias must have shape [4]", "is [3]")),
        ({"bias": torch.zeros(4, 1)}, ValueError, ("bias must have shape [4]", "is [4, 1]")),
        ({"bias": torch.zeros(())}, ValueError, ("bias must have shape [4]", "is []")),
        ({"bias": torch.zeros(4).long()}, TypeError, ("bias must be", DTYPES, "torch.int64")),
        (
            {"bias": torch.zeros(4, device="meta")},
            ValueError,
            ("bias must be on the weight's device cpu", "meta"),
        ),
    ],
)
def test_linear(changes, error, parts):
    with refuses(error, *parts):
        linear(**changes)


def conv2d(**changes):
    arguments = {
        "input": torch.ones(2, 4, 6, 6),
        "weight": torch.ones(6, 2, 3, 3),
        "threshold": torch.zeros(6),
        "bias": torch.zeros(6),
        "groups": 2,
    }
    return dst.masked_conv2d(**(arguments | changes))


def test_conv2d_accepts_what_the_cases_below_change():
    assert conv2d().shape == (2, 6, 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"groups": 4}, ValueError, ("groups must", "divide the 6 output channels", "is 4")),
        ({"groups": 0}, ValueError, ("groups must be at least 1", "is 0")),
        ({"groups": -2}, ValueError, ("groups must be at least 1", "is -2")),
        ({"groups": 1}, ValueError, ("input must have 2 channels", "groups=1", "[2, 4, 6, 6]")),
        ({"stride": 0}, ValueError, ("stride must be 2 integer(s) of at least 1", "(0, 0)")),
        ({"stride": (1, -1)}, ValueError, ("stride must be 2", "at least 1", "(1, -1)")),
        ({"stride": (1, 1, 1)}, ValueError, ("stride must be", "2 integers", "(1, 1, 1)")),
        ({"padding": -1}, ValueError, ("padding must be 2 integer(s) of at least 0", "(-1, -1)")),
        ({"padding": (1, 1, 1)}, ValueError, ("padding must be", "2 integers", "(1, 1, 1)")),
        ({"padding": "full"}, ValueError, ("padding must be 'same', 'valid' or", "'full'")),
        (
            {"padding": "same", "stride": 2},
            ValueError,
            ("padding='same' needs a stride of 1", "(2, 2)"),
        ),
        ({"dilation": 0}, ValueError, ("dilation must be 2 integer(s) of at least 1", "(0, 0)")),
        (
            {"input": torch.ones(2, 4, 2, 6)},
            ValueError,
            ("input is too small", "dimension 0 has 2 elements", "needs 3"),
        ),
        (
            {"dilation": 3},
            ValueError,
            ("input is too small", "6 elements", "needs 7"),
        ),
        ({"input": torch.ones(2, 3, 6, 6)}, ValueError, ("input must have 4 channels", "[2, 3,")),
        ({"input": torch.ones(6, 6)}, ValueError, ("input must", "4 channels", "[6, 6]")),
        ({"input": torch.ones(4, 6, 6).int()}, TypeError, ("input must", "torch.int32")),
        (
            {"input": torch.ones(2, 4, 6, 6).double()},
            TypeError,
            ("input must have the weight's dtype torch.float32 outside autocast", "float64"),
        ),
        (
            {"weight": torch.ones(6, 2, 3)},
            ValueError,
            ("weight must be [out, in/groups, *kernel] with 2 kernel dimension", "[6, 2, 3]"),
        ),
        ({"bias": torch.zeros(4)}, ValueError, ("bias must have shape [6]", "is [4]")),
        (
            {"input": torch.ones(2, 4, 6, 6, device="meta")},
            ValueError,
            ("input must be on the weight's device cpu", "meta"),
        ),
    ],
)
def test_conv2d(changes, error, parts):
    with refuses(error, *parts):
        conv2d(**changes)


@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_geometry_must_be_integers(name):
    for value in (1.5, (1, 1.5), "1", None):
        with refuses((TypeError, ValueError), name):
            conv2d(**{name: value})


def test_second_derivative():
    weight, threshold = torch.randn(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    input = torch.randn(2, 3, requires_grad=True)
    runs = [
        lambda: dst.masked_weight(weight, threshold).pow(2).sum(),
        lambda: dst.masked_linear(input, weight, threshold).pow(2).sum(),
        lambda: dst.masked_conv1d(input[..., None], weight[..., None], threshold).pow(2).sum(),
    ]
    for run in runs:
        (first,) = torch.autograd.grad(run(), weight, create_graph=True)
        with refuses(RuntimeError, "differentiated once only", "surrogate", "create_graph=True"):
            torch.autograd.grad(first.sum(), weight)
