"""Conversions of a layer or of its model: the threshold follows, but never below float32."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_cases import CASES, GRANULARITIES, every_layer
from torch import nn

from dst_kernels.nn import MaskedConv2d, MaskedLinear

# 1 + 2**-20 is exact in float32 and rounds to 1 in both 16-bit types.
FINE = 1 + 2**-20
SIXTEEN_BIT = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to_half": (lambda m: m.to(torch.float16), torch.float16),
    "to_device_bfloat16": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "to_tensor": (lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}
to_sixteen_bit = pytest.mark.parametrize("convert, dtype", SIXTEEN_BIT.values(), ids=SIXTEEN_BIT)


def with_fine_threshold(case, **options):
    layer = case.masked(*case.args, **options)
    layer.reset_threshold(FINE)
    layer.threshold.grad = torch.full_like(layer.threshold, FINE)
    layer.weight.grad = torch.ones_like(layer.weight)
    return layer


def assert_fine(layer, dtype=torch.float32):
    expected = torch.full_like(layer.threshold, FINE, dtype=dtype)
    for tensor in (layer.threshold.detach(), layer.threshold.grad):
        assert tensor.dtype == dtype and torch.equal(tensor, expected)


@to_sixteen_bit
def test_sixteen_bits_spare_the_threshold(convert, dtype):
    for case in CASES:
        layer = with_fine_threshold(case)
        threshold = layer.threshold
        assert convert(layer) is layer
        assert layer.weight.dtype == layer.bias.dtype == layer.weight.grad.dtype == dtype
        assert_fine(layer)
        assert layer.threshold is threshold, "optimizers hold this object"
        layer.float()
        assert layer.weight.dtype == torch.float32
        assert_fine(layer)


@to_sixteen_bit
def test_conversion_of_a_parent_module(convert, dtype):
    for granularity in GRANULARITIES:
        model = nn.Sequential(
            MaskedConv2d(3, 4, 3, granularity=granularity),
            nn.ModuleDict({"head": MaskedLinear(4, 2, granularity=granularity)}),
        )
        layers = [model[0], model[1]["head"]]
        for layer in layers:
            layer.reset_threshold(FINE)
            layer.threshold.grad = torch.full_like(layer.threshold, FINE)
        convert(model)
        for layer in layers:
            assert layer.weight.dtype == dtype
            assert_fine(layer)


def test_double_promotes_and_sixteen_bits_take_back_to_single():
    for case in CASES:
        layer = with_fine_threshold(case).double()
        assert layer.weight.dtype == torch.float64
        assert_fine(layer, torch.float64)
        layer.half()
        assert layer.weight.dtype == torch.float16
        assert_fine(layer, torch.float32)


@pytest.mark.parametrize(
    "flag", ["set_overwrite_module_params_on_conversion", "set_swap_module_params_on_conversion"]
)
def test_other_ways_in_which_torch_swaps_parameters(flag):
    for case in CASES:
        layer = with_fine_threshold(case)
        getattr(torch.__future__, flag)(True)
        try:
            layer.half()
        finally:
            getattr(torch.__future__, flag)(False)
        assert layer.weight.dtype == torch.float16 and isinstance(layer.threshold, nn.Parameter)
        assert_fine(layer)


def test_a_shared_threshold_survives():
    first, second = MaskedLinear(3, 3), MaskedLinear(3, 3)
    second.weight, second.threshold = first.weight, first.threshold
    first.reset_threshold(FINE)
    model = nn.Sequential(first, second).half()
    assert first.threshold is second.threshold
    assert first.threshold.dtype == torch.float32
    assert model[1].threshold.tolist() == [FINE] * 3


def test_meta_to_empty_keeps_dtypes():
    for case in CASES:
        layer = case.masked(*case.args, device="meta").half()
        assert layer.threshold.dtype == torch.float32
        layer.to_empty(device="cpu")
        assert layer.weight.dtype == torch.float16 and layer.threshold.dtype == torch.float32
        assert layer.threshold.device.type == "cpu"


def test_move_to_another_device():
    for case in CASES:
        layer = with_fine_threshold(case).to("meta", torch.bfloat16)
        assert layer.threshold.device.type == layer.weight.device.type == "meta"
        assert layer.threshold.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward_with_sixteen_bit_parameters(case, dtype):
    torch.manual_seed(0)
    exact = case.masked(*case.args).to(dtype).float()  # representable weights
    exact.reset_threshold(0.15 + 2**-14)
    layer = copy.deepcopy(exact).to(dtype)
    assert layer.threshold.dtype == torch.float32
    input = case.input(dtype)
    output = layer(input)
    output.float().square().sum().backward()
    expected = exact(input.float())
    expected.square().sum().backward()
    assert output.dtype == dtype and 0 < layer.remaining_ratio() < 1
    assert torch.equal(layer.mask(), exact.mask())
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=bound, atol=bound)
    assert layer.threshold.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    for name in ("weight", "bias", "threshold"):
        actual = layer.get_parameter(name).grad.float()
        wanted = exact.get_parameter(name).grad
        scale = wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, rtol=4 * bound, atol=4 * bound * scale)


def test_mask_compares_the_fp32_threshold():
    """A 16-bit threshold would round to the weights and prune them all."""
    for case in CASES:
        layer = case.masked(*case.args, dtype=torch.bfloat16, reset_ratio=None)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.threshold.fill_(1 - 2**-20)
        assert layer.mask().all()
        layer.reset_threshold(FINE)
        assert not layer.mask().any()


@every_layer
def test_deepcopy_and_pickle(case):
    for granularity in GRANULARITIES:
        layer = case.masked(
            *case.args, granularity=granularity, reset_ratio=None, surrogate="rectangular"
        )
        layer.reset_threshold(0.2)
        layer.eval()
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twins = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ]
        input = case.input()
        for twin in twins:
            assert type(twin) is type(layer) and repr(twin) == repr(layer)
            assert twin.threshold is not layer.threshold and not twin.training
            assert torch.equal(twin(input), layer(input))
            twin.reset_threshold(5.0)
            assert torch.equal(layer.threshold, torch.full_like(layer.threshold, 0.2))
