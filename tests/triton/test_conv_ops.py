"""The fused convolutions against the reference: geometry, memory formats, dtypes, the guard."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import (
    SURROGATES,
    by_reference,
    check,
    crossed,
    every_granularity,
    normal,
    on_gpu,
    run,
    same,
    thresholds,
)

from dst_kernels import reference
from dst_kernels.backends.triton import conv, linear
from dst_kernels.backends.triton.tiles import GradWeightTile, ProductTile
from dst_kernels.reference.conv import Geometry

pytestmark = pytest.mark.usefixtures("poisoned", "exact_convolutions")

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
CHANNELS_LAST = {3: torch.contiguous_format, 4: torch.channels_last}


@pytest.fixture
def exact_convolutions(float32_products):
    """torch rounds them to TF32 by default."""
    float32_products(torch.backends.cudnn.conv, "ieee")


@dataclass(frozen=True)
class Conv:
    """Images `size` of `batch` x `channels`; the rest as in torch's convolutions."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    batch: int = 2
    channels: int = 4
    filters: int = 6
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        dimensions = len(self.size)
        per_dimension = self.stride, self.padding, self.dilation
        return Geometry(*(list(each[:dimensions]) for each in per_dimension), self.groups)

    @property
    def input_shape(self):
        return self.batch, self.channels, *self.size

    @property
    def weight_shape(self):
        return self.filters, self.channels // self.groups, *self.kernel

    @property
    def output_shape(self):
        return self.geometry.output_shape(self.input_shape, self.weight_shape)


CONVS = {
    "plain": Conv((5, 6), (3, 3)),
    "padded": Conv((5, 6), (3, 2), padding=(1, 1)),
    "strided": Conv((7, 9), (3, 3), stride=(2, 2), padding=(1, 1)),
    "strided unevenly": Conv((7, 9), (3, 2), stride=(3, 2), padding=(0, 1)),
    "stride beyond the kernel": Conv((8, 7), (1, 2), stride=(2, 3)),
    "dilated": Conv((9, 7), (3, 3), padding=(2, 1), dilation=(2, 1)),
    "strided and dilated": Conv((9, 11), (3, 3), stride=(2, 3), padding=(2, 1), dilation=(2, 3)),
    "stride and dilation share a factor": Conv(
        (13, 13), (3, 3), stride=(4, 2), padding=(2, 3), dilation=(2, 4)
    ),
    "grouped": Conv((5, 5), (3, 3), filters=6, groups=2, padding=(1, 1)),
    "grouped and strided": Conv(
        (6, 7), (2, 3), channels=6, filters=9, groups=3, stride=(2, 1), padding=(1, 2)
    ),
    "depthwise": Conv((6, 5), (3, 2), channels=3, filters=3, groups=3, padding=(1, 1)),
    "depthwise, two filters each": Conv((6, 5), (1, 2), channels=3, filters=6, groups=3),
    "padding beyond the image": Conv((2, 3), (3, 3), padding=(4, 5)),
    "kernel as large as the image": Conv((4, 3), (4, 3)),
    "pointwise": Conv((4, 5), (1, 1)),
    "pointwise and strided": Conv((5, 5), (1, 1), stride=(2, 2)),
    "pointwise and padded": Conv((3, 3), (1, 1), padding=(1, 0)),
    "one pixel": Conv((1, 1), (1, 1), batch=1, channels=1, filters=1),
    "one dimension": Conv((11,), (3,), stride=(2,), padding=(1,), dilation=(2,)),
    "one dimension, grouped": Conv((8,), (4,), groups=2, padding=(3,)),
    "one dimension, pointwise": Conv((8,), (1,)),
    "tails of every tile": Conv((7, 6), (1, 2), channels=17, filters=66, padding=(0, 1)),
}
# The interpreter takes as long as there are taps.
SOME = {
    "strided and grouped": Conv((5, 4), (1, 2), filters=6, groups=2, stride=(1, 2), padding=(0, 1)),
    "one dimension": Conv((7,), (2,), stride=(2,), padding=(1,)),
    "pointwise": CONVS["pointwise"],
}
some_convs = pytest.mark.parametrize("of", list(SOME.values()), ids=list(SOME))

DTYPES = [
    pytest.param(F32, F32, F32, id="float32"),
    pytest.param(F16, F16, F32, id="float16"),
    pytest.param(F16, F32, F32, id="float16 autocast"),
    pytest.param(BF16, BF16, F32, id="bfloat16", marks=on_gpu),
    pytest.param(BF16, F32, F32, id="bfloat16 autocast", marks=on_gpu),
]
every_dtype = pytest.mark.parametrize(("of_input", "dtype", "of_threshold"), DTYPES)


def arguments(of, device, *, granularity="row", dtypes=(F32, F32, F32), channels_last=True):
    """(input, weight, threshold, bias, grad); the gradient as in the linear layer's tests."""
    of_input, dtype, of_threshold = dtypes
    arranged = CHANNELS_LAST[len(of.input_shape)] if channels_last else torch.contiguous_format

    def tensor(shape, dtype):
        return normal(*shape, dtype=dtype, device=device).contiguous(memory_format=arranged)

    input, weight = tensor(of.input_shape, of_input), tensor(of.weight_shape, dtype)
    threshold = thresholds(of.weight_shape, granularity, dtype=of_threshold, device=device)
    if threshold.dim() > 1:
        threshold = threshold.contiguous(memory_format=arranged)
    bias = normal(of.filters, dtype=dtype, device=device)
    summed = math.prod(of.weight_shape[1:])
    grad = reference.conv.conv(input.double(), weight.double(), None, of.geometry) / summed**0.5
    return input, weight, threshold, bias, grad.to(of_input)


def check_all(of, device, *, surrogate="long_tailed", **options):
    input, weight, threshold, bias, grad = arguments(of, device, **options)
    geometry = of.geometry
    check("masked_conv", input, weight, threshold, bias, 0.01, *geometry)
    check("masked_conv_grad_input", grad, list(input.shape), weight, threshold, *geometry)
    check("masked_conv_grad_weight", grad, input, weight, threshold, *geometry, surrogate, True)


@crossed(
    ("of", "granularity", "channels_last"),
    {name: (of,) for name, of in CONVS.items()},
    {"row": ("row", True), "element": ("element", False)},
)
def test_all_geometries(of, granularity, channels_last, device):
    check_all(of, device, granularity=granularity, channels_last=channels_last)


@some_convs
@every_dtype
@every_granularity
def test_all_dtypes(of, of_input, dtype, of_threshold, granularity, device):
    check_all(of, device, granularity=granularity, dtypes=(of_input, dtype, of_threshold))


@pytest.mark.gpu
@some_convs
def test_float32_that_may_round_to_tf32(of, device, float32_products):
    float32_products(torch.backends.cudnn.conv, "tf32")
    check_all(replace(of, batch=16, channels=32, filters=48), device)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [64, 200])
def test_sizes_that_fill_a_gpu(stride, channels, of_input, dtype, of_threshold, device):
    of = Conv(
        (28, 28), (3, 3), batch=32, channels=channels, filters=136, padding=(1, 1),
        stride=(stride, stride),
    )  # fmt: skip
    check_all(of, device, dtypes=(of_input, dtype, of_threshold))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_all_surrogates(surrogate, device):
    of = SOME["strided and grouped"]
    for granularity, structure_gradient in (("row", True), ("layer", True), ("element", False)):
        input, weight, threshold, _, grad = arguments(of, device, granularity=granularity)
        options = surrogate, structure_gradient
        check("masked_conv_grad_weight", grad, input, weight, threshold, *of.geometry, *options)


@some_convs
def test_the_guard_decides_exactly(of, device):
    """At the ratio thresholds count as 0 for the whole product; one weight above it they do not."""
    for granularity in ("row", "layer", "element"):
        input, weight, threshold, bias, _ = arguments(of, device, granularity=granularity)
        kept = reference.threshold_mask(weight, threshold).sum().item()
        for counted in {kept - 1, kept, kept + 1} & set(range(weight.numel() + 1)):
            ratio, fires = counted / weight.numel(), counted >= kept
            _, effective = check("masked_conv", input, weight, threshold, bias, ratio, *of.geometry)
            same((effective,), torch.zeros_like(threshold) if fires else threshold)


@pytest.mark.parametrize("of_bias", [None, F16, F32], ids=str)
@some_convs
def test_biases(of, of_bias, device):
    input, weight, threshold, bias, _ = arguments(of, device, dtypes=(F16, F32, F32))
    bias = None if of_bias is None else bias.to(of_bias)
    check("masked_conv", input, weight, threshold, bias, None, *of.geometry)


# -- layouts ---------------------------------------------------------------------------------------

LAYOUTS = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[..., :1].expand_as(t),
    "rows transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout, device):
    convs = itertools.islice(itertools.cycle(SOME.values()), list(LAYOUTS).index(layout), None)
    for which, of in zip(("input", "weight", "threshold", "grad", "all"), convs, strict=False):
        input, weight, threshold, _, grad = arguments(
            of, device, granularity="element", channels_last=False
        )
        tensors = {"input": input, "weight": weight, "threshold": threshold, "grad": grad}
        for each in tensors:
            if which in (each, "all"):
                tensors[each] = LAYOUTS[layout](tensors[each])
        input, weight, threshold, grad = tensors.values()
        limit = threshold.flatten(1)[:, 0] if which == "threshold" else threshold
        geometry = of.geometry
        check("masked_conv", input, weight, limit, None, 0.01, *geometry)
        check("masked_conv_grad_input", grad, list(input.shape), weight, limit, *geometry)
        check("masked_conv_grad_weight", grad, input, weight, limit, *geometry, "triangular", True)


@pytest.mark.parametrize("name", ["strided and grouped", "pointwise"])
def test_mixed_memory_formats(name, device):
    """Each result in the format its fake says, whatever the other arguments have."""
    of = SOME[name]
    for bits in (1, 2, 4, 8, 6, 9):
        formats = [CHANNELS_LAST[4] if bits >> i & 1 else torch.contiguous_format for i in range(4)]
        input, weight, threshold, bias, grad = arguments(of, device, granularity="element")
        input, weight, threshold, grad = (
            tensor.contiguous(memory_format=arranged)
            for tensor, arranged in zip((input, weight, threshold, grad), formats, strict=True)
        )
        check("masked_conv", input, weight, threshold, bias, None, *of.geometry)
        check("masked_conv_grad_input", grad, list(input.shape), weight, threshold, *of.geometry)
        options = "long_tailed", True
        check("masked_conv_grad_weight", grad, input, weight, threshold, *of.geometry, *options)


# -- tiles -----------------------------------------------------------------------------------------

SMALL_PRODUCT = ProductTile(block_m=16, block_r=16, block_c=16, warps=4, stages=2, unroll=2)


@crossed(
    ("split", "pieces", "granularity", "of_input"),
    {"in pieces": (1, 2), "split": (2, 1), "split further": (5, 1)},
    {"row": ("row", F16), "layer": ("layer", F32), "element": ("element", F32)},
)
def test_small_and_split_tiles(split, pieces, granularity, of_input, device, monkeypatch):
    gradient = GradWeightTile(
        block_r=16, block_c=16, block_m=16, warps=4, stages=2, pieces=pieces, split=split
    )
    monkeypatch.setattr(conv, "conv_product_tile", lambda *_: SMALL_PRODUCT)
    monkeypatch.setattr(conv, "conv_grad_weight_tile", lambda *_: gradient)
    dtypes = of_input, F32, F32
    for name, channels_last in (("strided and grouped", True), ("one dimension", False)):
        of = replace(SOME[name], channels=34, filters=34, batch=3)
        check_all(of, device, granularity=granularity, dtypes=dtypes, channels_last=channels_last)


def test_results_repeat_bit_by_bit(device, monkeypatch):
    gradient = GradWeightTile(16, 16, 16, warps=4, stages=2, split=3)
    monkeypatch.setattr(conv, "conv_grad_weight_tile", lambda *_: gradient)
    of = SOME["strided and grouped"]
    input, weight, threshold, bias, grad = arguments(of, device)
    for name, *given_to in (
        ("masked_conv", input, weight, threshold, bias, 0.01, *of.geometry),
        ("masked_conv_grad_input", grad, list(input.shape), weight, threshold, *of.geometry),
        ("masked_conv_grad_weight", grad, input, weight, threshold, *of.geometry, "triangular",
         True),
    ):  # fmt: skip
        for first, second in zip(run(name, *given_to), run(name, *given_to), strict=True):
            assert torch.equal(first, second)


# -- special values, empty tensors, refusals -------------------------------------------------------


@some_convs
@pytest.mark.parametrize("where", ["weight", "threshold"])
def test_nan_is_never_pruned_away(of, where, device):
    of = replace(of, padding=(0, 0))  # zero times NaN: in the padding too, or not, is nobody's rule
    input, weight, threshold, bias, grad = arguments(of, device)
    poisoned = {"weight": weight, "threshold": threshold}[where]
    poisoned[(0,) * poisoned.dim()] = math.nan
    ours = run("masked_conv", input, weight, threshold, bias, None, *of.geometry)
    plain = by_reference("masked_conv", input, weight, threshold, bias, None, *of.geometry)
    for result, truth in zip(ours, plain, strict=True):
        torch.testing.assert_close(result, truth, equal_nan=True, rtol=1e-5, atol=1e-5)
    given_to = grad, list(input.shape), weight, threshold, *of.geometry
    (result,) = run("masked_conv_grad_input", *given_to)
    truth = by_reference("masked_conv_grad_input", *given_to)
    assert bool((result.isnan() >= truth.isnan()).all()), "and at the edges perhaps, as above"
    finite = result.isfinite()
    assert not finite.all()
    torch.testing.assert_close(result[finite], truth[finite], rtol=1e-5, atol=1e-5)


def test_ties_are_pruned(device):
    of = CONVS["padded"]
    input, weight, _, _, grad = arguments(of, device)
    weight = torch.full_like(weight, 0.5)
    threshold = torch.full((of.filters,), 0.5, device=device)
    output, _ = run("masked_conv", input, weight, threshold, None, None, *of.geometry)
    assert not output.any()
    given_to = grad, list(input.shape), weight, threshold, *of.geometry
    assert not run("masked_conv_grad_input", *given_to)[0].any()
    given_to = grad, input, weight, threshold, *of.geometry, "long_tailed", False
    grad_weight, grad_threshold = run("masked_conv_grad_weight", *given_to)
    assert not grad_weight.any() and grad_threshold.any()


EMPTY = {
    "no images": Conv((5, 6), (3, 3), batch=0),
    "no channels": Conv((5, 6), (3, 3), channels=0),
    "no filters": Conv((5, 6), (3, 3), filters=0),
    "no images, pointwise": Conv((5, 6), (1, 1), batch=0),
    "no channels, pointwise": Conv((5, 6), (1, 1), channels=0),
    "no images, line": Conv((6,), (3,), batch=0),
}


@pytest.mark.parametrize("name", list(EMPTY))
def test_sizes_of_zero(name, device):
    of = EMPTY[name]
    input, weight = (normal(*s, device=device) for s in (of.input_shape, of.weight_shape))
    bias, grad = normal(of.filters, device=device), normal(*of.output_shape, device=device)
    expected = bias.view(-1, *[1] * len(of.size)).expand(of.output_shape)
    geometry, options = of.geometry, ("long_tailed", True)
    for granularity in ("row", "scalar", "layer", "element"):
        threshold = thresholds(of.weight_shape, granularity, device=device)
        for ratio in (None, 1.0):
            output, effective = run("masked_conv", input, weight, threshold, bias, ratio, *geometry)
            same((output,), expected)
            same((effective,), reference.effective_threshold(weight, threshold, ratio))
        gradients = (
            *run("masked_conv_grad_input", grad, list(input.shape), weight, threshold, *geometry),
            *run("masked_conv_grad_weight", grad, input, weight, threshold, *geometry, *options),
        )
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["no images", "no images, pointwise"])
def test_no_images_in_split_tiles(name, device, monkeypatch):
    """As tuning tries them."""
    split = GradWeightTile(16, 16, 16, warps=4, stages=2, split=2)
    monkeypatch.setattr(conv, "conv_grad_weight_tile", lambda *_: split)
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_: split)
    of = EMPTY[name]
    input, weight = (normal(*s, device=device) for s in (of.input_shape, of.weight_shape))
    threshold = thresholds(of.weight_shape, "row", device=device)
    grad = normal(*of.output_shape, device=device)
    given_to = grad, input, weight, threshold, *of.geometry, "long_tailed", True
    for result in run("masked_conv_grad_weight", *given_to):
        assert not result.any()


def test_three_dimensions_are_refused(device):
    input, weight = normal(1, 2, 3, 3, 3, device=device), normal(2, 2, 2, 2, 2, device=device)
    threshold, grad = torch.zeros(2, device=device), normal(1, 2, 2, 2, 2, device=device)
    geometry = [1, 1, 1], [0, 0, 0], [1, 1, 1], 1
    for op in (
        lambda: run("masked_conv", input, weight, threshold, None, None, *geometry),
        lambda: run(
            "masked_conv_grad_input", grad, list(input.shape), weight, threshold, *geometry
        ),
        lambda: run(
            "masked_conv_grad_weight", grad, input, weight, threshold, *geometry, "triangular", True
        ),
    ):
        with pytest.raises(RuntimeError, match=r"one or two dimensions.* has 3: use path='packed'"):
            op()


@pytest.mark.parametrize("name", ["input", "weight", "threshold"])
def test_float64_is_refused_by_name(name, device):
    of = CONVS["padded"]
    input, weight, threshold, _, _ = arguments(of, device)
    tensors = {"input": input, "weight": weight, "threshold": threshold}
    tensors[name] = tensors[name].double()
    with pytest.raises(TypeError, match=f"{name} must be .*Use path='packed'"):
        run("masked_conv", *tensors.values(), None, None, *of.geometry)


# -- any convolution at all ------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    dimensions = draw(st.sampled_from([1, 2]))

    def per_dimension(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, dilation, padding = per_dimension(1, 3), per_dimension(1, 3), per_dimension(0, 4)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return Conv(
        size=tuple(n + draw(st.integers(0, 6)) for n in least),
        kernel=kernel,
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.integers(1, 5)),
        filters=groups * draw(st.integers(1, 5)),
        stride=per_dimension(1, 4),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    of=convolutions(),
    granularity=st.sampled_from(["row", "layer", "element"]),
    channels_last=st.booleans(),
)
def test_any_convolution(of, granularity, channels_last, device):
    torch.manual_seed(0)
    check_all(of, device, granularity=granularity, channels_last=channels_last)
