"""Building masked layers: arguments as in the parent, options by keyword only, errors, repr."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from layer_cases import CASES, GRANULARITIES, every_layer, threshold_of_each_weight
from torch import nn

from dst_kernels.nn import MaskedConv2d, MaskedLayer, MaskedLinear

OPTIONS = ["granularity", "reset_ratio", "surrogate", "structure_gradient", "backend", "path"]


def test_signature_is_the_parents_plus_keyword_only_options():
    for case in CASES:
        ours = inspect.signature(case.masked).parameters
        parents = inspect.signature(case.dense).parameters
        positional = [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
        assert positional == list(parents)
        for name in positional:
            assert ours[name].default == parents[name].default, name
        assert [n for n, p in ours.items() if p.kind is p.KEYWORD_ONLY] == OPTIONS


def test_all_arguments_by_position():
    linear = MaskedLinear(6, 5, False, "cpu", torch.float64)
    assert linear.bias is None and linear.weight.dtype == torch.float64
    conv = MaskedConv2d(4, 8, 3, 2, 1, 2, 2, False, "reflect", "cpu", torch.float64)
    twin = nn.Conv2d(4, 8, 3, 2, 1, 2, 2, False, "reflect", "cpu", torch.float64)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "bias"):
        assert getattr(conv, name) == getattr(twin, name), name
    with pytest.raises(TypeError):
        MaskedLinear(6, 5, False, "cpu", torch.float64, "layer")


def test_is_its_parent_and_initialises_alike():
    for case in CASES:
        torch.manual_seed(3)
        dense = case.dense(*case.args)
        torch.manual_seed(3)
        masked = case.masked(*case.args)
        assert isinstance(masked, case.dense) and isinstance(masked, MaskedLayer)
        assert torch.equal(masked.weight, dense.weight) and torch.equal(masked.bias, dense.bias)


@every_layer
def test_threshold_shape(case):
    for granularity in GRANULARITIES:
        layer = case.masked(*case.args, granularity=granularity)
        shape = {"row": layer.bias.shape, "layer": (1,), "element": layer.weight.shape}
        assert layer.threshold.shape == shape[granularity]
        assert isinstance(layer.threshold, nn.Parameter) and layer.threshold.requires_grad
        assert torch.count_nonzero(layer.threshold) == 0


@every_layer
def test_threshold_dtype(case):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        layer = case.masked(*case.args, dtype=dtype)
        assert layer.weight.dtype == dtype
        assert layer.threshold.dtype == torch.promote_types(dtype, torch.float32)


@every_layer
def test_meta_device_and_skip_init(case):
    layer = case.masked(*case.args, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(case.input().to("meta")).device.type == "meta"  # trains without reading values
    assert layer.mask().shape == layer.weight.shape
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer.weight).all() and torch.count_nonzero(layer.threshold) == 0
    skipped = torch.nn.utils.skip_init(case.masked, *case.args, granularity="layer")
    assert skipped.weight.device.type == "cpu" and skipped.granularity == "layer"
    assert skipped.weight.shape == layer.weight.shape and skipped.threshold.shape == (1,)


def test_extra_repr_names_the_options_and_reads_no_values():
    for case in CASES:
        layer = case.masked(
            *case.args,
            device="meta",  # where reading a value fails
            granularity="element",
            reset_ratio=0.25,
            surrogate="triangular",
            structure_gradient=False,
            backend="reference",
        )
        text = repr(layer)
        assert text.startswith(f"{case.masked.__name__}(")
        assert case.dense(*case.args).extra_repr() in text
        for option in (
            "granularity=element",
            "reset_ratio=0.25",
            "surrogate=triangular",
            "structure_gradient=False",
            "backend=reference",
        ):
            assert option in text


@every_layer
def test_reset_parameters_and_reset_threshold(case):
    layer = case.masked(*case.args)
    layer.reset_threshold(0.25)
    assert torch.equal(layer.threshold, torch.full_like(layer.threshold, 0.25))
    layer.reset_threshold()
    assert torch.count_nonzero(layer.threshold) == 0
    layer.reset_threshold(0.25)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    assert torch.equal(layer.weight, case.dense(*case.args).weight)
    assert torch.count_nonzero(layer.threshold) == 0
    assert layer.threshold.requires_grad and layer.threshold.grad_fn is None


@every_layer
def test_mask_and_remaining_ratio_by_definition(case):
    for granularity in GRANULARITIES:
        torch.manual_seed(0)
        layer = case.masked(*case.args, granularity=granularity)
        with torch.no_grad():
            layer.threshold.uniform_(0, float(layer.weight.abs().max()))
            exact = layer.weight.abs().flatten()[0]
            layer.threshold.view(-1)[0] = exact  # on the boundary: S(0) = 0
        mask, ratio = layer.mask(), layer.remaining_ratio()
        expected = layer.weight.abs() > threshold_of_each_weight(layer)
        assert mask.dtype == torch.bool and torch.equal(mask, expected)
        assert not mask.flatten()[0]
        assert ratio.shape == () and ratio.dtype == torch.float32 and not ratio.requires_grad
        assert ratio.item() == pytest.approx(expected.sum().item() / expected.numel(), rel=1e-7)


@pytest.mark.parametrize(
    "option, named",
    [
        ({"granularity": "column"}, "granularity"),
        ({"surrogate": "sigmoid"}, "surrogate"),
        ({"backend": "tpu"}, "backend"),
        ({"reset_ratio": -0.1}, "reset_ratio"),
        ({"reset_ratio": 1.5}, "reset_ratio"),
        ({"reset_ratio": float("nan")}, "reset_ratio"),
    ],
)
def test_bad_options_fail_at_construction(option, named):
    for case in CASES:
        with pytest.raises(ValueError, match=named):
            case.masked(*case.args, **option)
        with pytest.raises(ValueError, match=named):
            case.masked.from_dense(case.dense(*case.args), **option)


def test_reset_ratio_limits_are_fine():
    for case, ratio in itertools.product(CASES, (None, 0, 0.0, 1, 1.0)):
        assert case.masked(*case.args, reset_ratio=ratio).reset_ratio == ratio


def test_backend_from_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("DST_KERNELS_BACKEND", "tpu")
    for case in CASES:
        with pytest.raises(ValueError, match="DST_KERNELS_BACKEND"):
            case.masked(*case.args)


def test_complex_weights_are_refused():
    for case, dtype in itertools.product(CASES, (torch.complex64, torch.complex128)):
        with pytest.raises(TypeError, match="complex"):
            case.masked(*case.args, dtype=dtype)
        with pytest.raises(TypeError, match="complex"):
            case.masked.from_dense(case.dense(*case.args, dtype=dtype))


def test_integer_weights_are_refused():
    for case, dtype in itertools.product(CASES, (torch.int8, torch.int64)):
        dense = case.dense(*case.args)
        dense.weight = nn.Parameter(torch.ones_like(dense.weight, dtype=dtype), requires_grad=False)
        with pytest.raises(TypeError, match="weight"):
            case.masked.from_dense(dense)
