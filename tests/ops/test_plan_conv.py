"""The planner of convolutions: packed, but where a measurement nearby says otherwise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dst_kernels.functional as dst
from dst_kernels.autograd import conv, product
from dst_kernels.plan import PLANS, ConvKind, Plan, plan_conv

from .plan_tables import GPU, PACKED_WINS, case, conv_case

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("fresh_costs")


def plan(M=4096, N=256, C=256, of_input=BF16, of_weight=F32, **options):
    kind = {"kernel": (3, 3), "stride": (1, 1), "groups": 1, "pointwise": False}
    kind = ConvKind(**{name: options.pop(name, value) for name, value in kind.items()})
    options = {"channels_last": True, "gpu": GPU, **options}
    return plan_conv(M, N, C, of_input, of_weight, kind, **options)


POINTWISE = {"kernel": (1, 1), "pointwise": True}


def test_nothing_measured_is_packed():
    dtypes = ((BF16, F32), (BF16, BF16), (F16, F32), (F32, F32), (F64, F64))
    for M, N, C, dtype in itertools.product((0, 1, 4096, 2**22), (1, 512), (1, 64), dtypes):
        for kernel, gpu, flags in itertools.product(
            ((1,), (1, 1), (3, 3), (1, 1, 1)),
            (None, GPU, "NVIDIA H200"),
            itertools.product((True, False), repeat=4),
        ):
            channels_last, tf32, needs_grad_input, packed_available = flags
            options = {
                **{"kernel": kernel, "stride": (1,) * len(kernel), "gpu": gpu, "tf32": tf32},
                **{"pointwise": set(kernel) == {1}, "channels_last": channels_last},
                **{"needs_grad_input": needs_grad_input, "packed_available": packed_available},
            }
            assert plan(M, N, C, *dtype, **options) == PLANS["packed"]


def test_measurements_decide_product_by_product(table):
    table(convs=[conv_case()])
    assert plan() == PLANS["fused"]
    table(convs=[conv_case(**PACKED_WINS)])
    assert plan() == PLANS["packed"]
    table(convs=[conv_case(**{**PACKED_WINS, "grad_weight": (1.0, 2.0)})])
    assert plan() == PLANS["mixed"]
    table(convs=[conv_case(forward=(2.0, 1.0), grad_input=(1.0, 2.0))])
    assert plan() == Plan("packed", "fused", "fused")
    table(convs=[conv_case(grad_weight=(2.0, 1.0))])
    assert plan() == Plan("fused", "fused", "packed")


def test_what_is_needed_and_what_is_there_count(table):
    table(convs=[conv_case(forward=(2.0, 3.0), grad_input=(5.0, 1.0))])
    assert plan(needs_grad_input=True) == Plan("packed", "packed", "fused")
    assert plan(needs_grad_input=False).forward == "fused"
    table(convs=[conv_case()])
    assert plan(packed_available=True) == PLANS["mixed"]


def test_the_nearest_case_counts(table):
    table(convs=[conv_case(M=64), conv_case(M=4096, **PACKED_WINS)])
    assert plan(M=64) == plan(M=256) == PLANS["fused"]
    assert plan(M=2048) == plan(M=16384) == PLANS["packed"]
    for size in ("N", "C"):
        table(convs=[conv_case(**{size: 64}), conv_case(**{size: 512}, **PACKED_WINS)])
        assert plan(**{size: 128}) == PLANS["fused"]
        assert plan(**{size: 256}) == PLANS["packed"]


@pytest.mark.parametrize(
    "other",
    [
        {"M": 8 * 4096 + 1},
        {"M": 2 * 4096, "N": 2 * 256, "C": 3 * 256},
        {"kernel": (3, 1)},
        {"kernel": (3,), "stride": (1,)},
        {"stride": (2, 1)},
        {"groups": 2},
        {"of_input": F16},
        {"of_weight": BF16},
        {"gpu": "another"},
        {"gpu": None},
    ],
    ids=str,
)
def test_what_is_far_or_unlike_does_not_count(table, other):
    table(convs=[conv_case()])
    assert plan(M=8 * 4096) == PLANS["fused"], "the farthest that counts"
    assert plan(**other) == PLANS["packed"]


@pytest.mark.parametrize("kernel", [(3,), (5, 3)])
def test_geometry_of_one_and_two_dimensions(table, kernel):
    stride = tuple(range(1, len(kernel) + 1))
    table(convs=[conv_case(kernel=kernel, stride=stride, groups=4)])
    assert plan(kernel=kernel, stride=stride, groups=4) == PLANS["fused"]


def test_linear_measurements_serve_pointwise_convolutions(table):
    table([case(M=4096, N=256, K=256)])
    assert plan(**POINTWISE) == PLANS["fused"]
    assert plan(**POINTWISE, C=16 * 256) == PLANS["packed"]
    assert plan() == PLANS["packed"]
    assert plan(**POINTWISE, channels_last=False) == PLANS["packed"]
    assert plan(kernel=(1,), stride=(1,), pointwise=True) == PLANS["fused"]


def test_those_of_convolutions_come_first(table):
    linear = case(M=4096, N=256, K=256)
    table([linear], convs=[conv_case(M=2048, kernel=(1, 1), **PACKED_WINS)])
    assert plan(**POINTWISE) == PLANS["packed"]
    table([linear], convs=[conv_case(M=1, kernel=(1, 1), **PACKED_WINS)])
    assert plan(**POINTWISE) == PLANS["fused"]


def test_packed_where_there_is_no_kernel_whatever_was_measured(table):
    float32 = {"input_dtype": "float32"}
    everywhere = [
        conv_case(),
        conv_case(**float32),
        conv_case(input_dtype="float64", weight_dtype="float64"),
        conv_case(weight_dtype="float64"),
        conv_case(kernel=(3, 3, 3), stride=(1, 1, 1)),
    ]
    table(convs=everywhere)
    assert plan(channels_last=False) == PLANS["packed"]
    assert plan(kernel=(3, 3, 3), stride=(1, 1, 1)) == PLANS["packed"]
    assert plan(of_input=F64, of_weight=F64) == plan(of_weight=F64) == PLANS["packed"]
    assert plan(of_input=F32, tf32=True) == PLANS["fused"]
    assert plan(of_input=F32, tf32=False) == PLANS["packed"]


# -- from the op's arguments to the planner's ------------------------------------------------------


class OpsRun(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dst_kernels":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if Triton served and the GPU were that of the tables."""
    monkeypatch.setattr(product, "serving", lambda backend, device: ("cuda", "triton"))
    monkeypatch.setattr(conv, "gpu_name", lambda device: GPU)


def run(convolution, input, weight, path="auto", **options):
    input = input.bfloat16().requires_grad_()
    weight = weight.bfloat16().requires_grad_()
    with OpsRun() as ops:
        output = convolution(input, weight, torch.zeros(len(weight)), path=path, **options)
        output.float().sum().backward()
    return ops.names


PACKED_OPS = ["masked_weight", "masked_weight_backward"]
FUSED_OPS = ["masked_conv", "masked_conv_grad_weight", "masked_conv_grad_input"]


def test_auto_asks_the_planner(table, on_a_gpu):
    geometry = {"stride": (2, 1), "padding": (1, 0), "groups": 2}
    measured = {"kernel": (3, 2), "stride": (2, 1), "groups": 2, "weight_dtype": "bfloat16"}
    input = torch.randn(2, 8, 9, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 4, 3, 2)
    sizes = {"M": 2 * 5 * 5, "N": 16, "C": 4}
    for size, value in sizes.items():  # just near enough, so that each size must be the right one
        for factor in (8, 9):
            table(convs=[conv_case(**{**sizes, size: factor * value}, **measured)])
            ran = run(dst.masked_conv2d, input, weight, **geometry)
            assert ran == (FUSED_OPS if factor == 8 else PACKED_OPS), (size, factor)
    table(convs=[conv_case(**sizes, **measured)])
    assert run(dst.masked_conv2d, input.contiguous(), weight, **geometry) == PACKED_OPS
    assert run(dst.masked_conv2d, input, weight, path="packed", **geometry) == PACKED_OPS


def test_lines_with_their_channels_last(table, on_a_gpu):
    weight = torch.randn(16, 8, 3)
    measured = {"kernel": (3,), "stride": (1,), "weight_dtype": "bfloat16"}
    table(convs=[conv_case(M=2 * 7, N=16, C=8, **measured)])
    assert run(dst.masked_conv1d, torch.randn(2, 9, 8).mT, weight) == FUSED_OPS
    assert run(dst.masked_conv1d, torch.randn(2, 8, 9), weight) == PACKED_OPS


@pytest.mark.parametrize(
    ("changed", "fused"),
    [({}, True), ({"padding": 1}, False), ({"stride": 2}, False), ({"groups": 2}, False)],
    ids=str,
)
def test_what_is_pointwise(table, on_a_gpu, changed, fused):
    table([case(M=2 * 5 * 6, N=16, K=8, weight_dtype="bfloat16")])
    weight = torch.randn(16, 8 // changed.get("groups", 1), 1, 1)
    input = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    assert run(dst.masked_conv2d, input, weight, **changed) == (FUSED_OPS if fused else PACKED_OPS)
    three = torch.randn(2, 8, 1, 5, 6).to(memory_format=torch.channels_last_3d)
    assert run(dst.masked_conv3d, three, weight[..., None], **changed) == PACKED_OPS
