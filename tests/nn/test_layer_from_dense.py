"""`from_dense` and `to_dense`: same Parameters, hooks, mode and attributes on the other type."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, GRANULARITIES, every_layer, threshold_of_each_weight
from torch import nn

from dst_kernels.nn import MaskedConv1d, MaskedLinear


@every_layer
def test_shares_parameters_and_outputs(case):
    for granularity in GRANULARITIES:
        dense = case.dense(*case.args)
        weight, bias = dense.weight, dense.bias
        masked = case.masked.from_dense(dense, granularity=granularity)
        assert type(masked) is case.masked and masked is not dense
        assert masked.weight is weight and masked.bias is bias
        assert masked.granularity == granularity and torch.count_nonzero(masked.threshold) == 0
        assert torch.equal(masked(case.input()), dense(case.input()))
        assert list(dense.state_dict()) == ["weight", "bias"], "the dense layer is left as it was"
        assert repr(dense) == repr(case.dense(*case.args))


def test_options_arrive():
    for case in CASES:
        masked = case.masked.from_dense(
            case.dense(*case.args),
            reset_ratio=None,
            surrogate="triangular",
            structure_gradient=False,
            backend="reference",
        )
        assert masked.reset_ratio is None and masked.surrogate == "triangular"
        assert masked.structure_gradient is False and masked.backend == "reference"
        with pytest.raises(TypeError):
            case.masked.from_dense(case.dense(*case.args), "layer")


@every_layer
def test_keeps_geometry_mode_attributes_and_dtype(case):
    dense = case.dense(*case.args, bias=False, dtype=torch.bfloat16).eval()
    dense.tag = {"fqn": "a.b"}
    dense.weight.requires_grad_(False)
    dense.register_buffer("scale", torch.ones(2))
    masked = case.masked.from_dense(dense)
    assert not masked.training and masked.bias is None and masked.tag is not None
    assert masked.tag["fqn"] == "a.b" and masked.scale is dense.scale
    assert masked.weight.dtype == torch.bfloat16 and masked.threshold.dtype == torch.float32
    assert not masked.weight.requires_grad and not masked.threshold.requires_grad
    assert case.dense(*case.args, bias=False).extra_repr() in masked.extra_repr()
    masked.train()
    assert not dense.training, "containers of its own"
    masked.register_buffer("late", torch.ones(1))
    assert "late" not in dense.state_dict()


@every_layer
def test_hooks_fire_on_the_masked_layer(case):
    dense, seen = case.dense(*case.args), []
    dense.register_forward_pre_hook(lambda module, args: seen.append(("pre", type(module))))
    dense.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(("post", type(module))), with_kwargs=True
    )
    dense.register_full_backward_hook(lambda module, *grads: seen.append(("back", type(module))))
    masked = case.masked.from_dense(dense)
    masked(case.input().requires_grad_()).sum().backward()
    assert seen == [(kind, case.masked) for kind in ("pre", "post", "back")]


def test_hook_handles_from_before_still_remove():
    dense, seen = nn.Linear(6, 5), []
    handle = dense.register_forward_hook(lambda *args: seen.append(1))
    masked = MaskedLinear.from_dense(dense)
    del dense
    handle.remove()
    masked(torch.randn(4, 6))
    assert not seen


@every_layer
def test_to_dense_bakes_the_mask_in(case):
    for granularity in GRANULARITIES:
        torch.manual_seed(0)
        masked = case.masked(*case.args, granularity=granularity).eval()
        masked.reset_threshold(0.5 * masked.weight.abs().max().item())
        masked.tag = "kept"
        before = {name: value.clone() for name, value in masked.state_dict().items()}
        dense = masked.to_dense()
        assert type(dense) is case.dense and not dense.training and dense.tag == "kept"
        assert repr(dense) == repr(case.dense(*case.args))
        assert list(dense.state_dict()) == ["weight", "bias"]
        kept = masked.weight.abs() > threshold_of_each_weight(masked)
        assert 0 < kept.sum() < kept.numel()
        assert torch.equal(dense.weight, masked.weight * kept)
        assert isinstance(dense.weight, nn.Parameter) and dense.weight.is_leaf
        assert dense.bias is masked.bias
        assert torch.equal(dense(case.input()), masked(case.input()))
        for name, value in before.items():
            assert torch.equal(masked.state_dict()[name], value), (
                "the masked layer is left as it was"
            )
        with torch.no_grad():
            dense.weight.zero_()
        assert torch.equal(masked.weight, before["weight"])


def test_to_dense_uses_the_effective_threshold():
    for case in CASES:
        masked = case.masked(*case.args)
        masked.reset_threshold(100.0)
        assert torch.equal(masked.to_dense().weight, masked.weight)
        assert masked.threshold.min() == 100, "and commits nothing"
        unguarded = case.masked(*case.args, reset_ratio=None)
        unguarded.reset_threshold(100.0)
        assert torch.count_nonzero(unguarded.to_dense().weight) == 0


def test_there_and_back():
    for case in CASES:
        dense = case.dense(*case.args)
        again = case.masked.from_dense(dense).to_dense()
        assert type(again) is case.dense and vars(again).keys() == vars(dense).keys()
        assert torch.equal(again.weight, dense.weight) and again.bias is dense.bias


def test_to_dense_keeps_memory_format_and_frozen_weights():
    for case in CASES:
        masked = case.masked(*case.args)
        masked.weight.requires_grad_(False)
        if masked.weight.dim() == 4:
            masked = masked.to(memory_format=torch.channels_last)
        dense = masked.to_dense()
        assert not dense.weight.requires_grad and dense.weight.stride() == masked.weight.stride()


def test_wrong_types_are_refused():
    for case in CASES:
        for other in CASES:
            if other is not case:
                with pytest.raises(TypeError, match=case.dense.__name__):
                    case.masked.from_dense(other.dense(*other.args))
        with pytest.raises(TypeError, match=case.masked.__name__):
            case.masked.from_dense(case.masked(*case.args))
    with pytest.raises(TypeError, match="ConvTranspose1d"):
        MaskedConv1d.from_dense(nn.ConvTranspose1d(2, 3, 1))
    for wrong in (nn.Bilinear(2, 3, 4), nn.Linear, None, torch.zeros(2, 3)):
        with pytest.raises(TypeError):
            MaskedLinear.from_dense(wrong)
