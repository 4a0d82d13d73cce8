"""torch's encoder layer, whose fused evaluation path would read the weights and miss the masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import masked_weights, prune_half

import dst_kernels


def encoder_layer(**options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(8, 2, 16, **options).eval()


def on_the_ordinary_path(model, *args, **kwargs):
    """Outputs of a dense model without the fused layer, which is not taken where hooks are set.

    Attention inside keeps its own fused kernel, as it does beside masked layers.
    """
    handles = [
        module.linear1.register_forward_hook(lambda *_: None)
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
    ]
    output = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return output


def fused_calls(model, *args, **kwargs):
    """How often a call of the model runs torch's fused encoder layer."""
    with torch.profiler.profile() as profile:
        model(*args, **kwargs)
    name = "aten::_transformer_encoder_layer_fwd"
    return sum(event.count for event in profile.key_averages() if event.key == name)


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_masks_count_in_evaluation_without_gradients(activation, norm_first):
    model, input = encoder_layer(activation=activation, norm_first=norm_first), torch.randn(3, 5, 8)
    assert fused_calls(model, input) == 1, "or there is nothing to test"
    dense = on_the_ordinary_path(model, input)
    dst_kernels.sparsify_(model)
    assert set(masked_weights(model)) == {
        "linear1", "linear2", "self_attn.in_proj_weight", "self_attn.out_proj"
    }  # fmt: skip
    assert fused_calls(model, input) == 0
    assert torch.equal(model(input), dense)
    prune_half(model)
    pruned = model(input)
    assert (pruned - dense).abs().max() > 1e-2
    final = dst_kernels.finalize_(copy.deepcopy(model))
    assert torch.equal(on_the_ordinary_path(final, input), pruned)
    assert fused_calls(final, input) == 1, "dense again, so fused again"
    torch.testing.assert_close(final(input), pruned, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_grad_mode_and_inference_mode_agree():
    model = dst_kernels.sparsify_(encoder_layer())
    prune_half(model)
    input = torch.randn(3, 5, 8)
    without = model(input)
    with torch.enable_grad():
        torch.testing.assert_close(model(input), without, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(model(input), without)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_an_encoder_with_padding():
    """On the fused path such an encoder would also make nested tensors of its input."""
    model, input = nn.TransformerEncoder(encoder_layer(), 2).eval(), torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 4:] = True
    visible = ~padding
    assert fused_calls(model, input, src_key_padding_mask=padding) == 2
    with torch.enable_grad():  # no fused kernels at all
        dense = model(input, src_key_padding_mask=padding).detach()
    dst_kernels.sparsify_(model)
    torch.testing.assert_close(
        model(input, src_key_padding_mask=padding)[visible], dense[visible], rtol=1e-5, atol=1e-6
    )
    prune_half(model)
    pruned = model(input, src_key_padding_mask=padding)[visible]
    assert (pruned - dense[visible]).abs().max() > 1e-2
    final = dst_kernels.finalize_(model)
    assert fused_calls(final, input, src_key_padding_mask=padding) == 2
    actual = final(input, src_key_padding_mask=padding)[visible]
    torch.testing.assert_close(actual, pruned, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_only_layers_that_hold_masks_leave_the_fused_path():
    model = nn.Sequential(encoder_layer(), encoder_layer())
    dst_kernels.sparsify_(model, filter_fn=lambda module, name: name.startswith("1."))
    assert fused_calls(model, torch.randn(2, 3, 8)) == 1


@torch.no_grad()
def test_the_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 2, 4, 8)
    dense = on_the_ordinary_path(model, source, target)
    dst_kernels.sparsify_(model)
    torch.testing.assert_close(model(source, target), dense, rtol=1e-5, atol=1e-6)
    for part in masked_weights(model).values():
        before = model(source, target)
        part.threshold.copy_(part.weight.abs().median(1).values)
        assert not torch.equal(model(source, target), before)
    pruned = model(source, target)
    final = dst_kernels.finalize_(model)
    ordinary = on_the_ordinary_path(final, source, target)
    torch.testing.assert_close(ordinary, pruned, rtol=1e-5, atol=1e-6)


def test_state_survives_deepcopy_and_training_mode():
    model = dst_kernels.sparsify_(encoder_layer())
    prune_half(model)
    twin, input = copy.deepcopy(model), torch.randn(3, 5, 8)
    twin.train()(input).sum().backward()
    assert torch.count_nonzero(twin.linear1.threshold.grad)
    with torch.no_grad():
        assert torch.equal(twin.eval()(input), model(input))
        assert fused_calls(twin, input) == 0
