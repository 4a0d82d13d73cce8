"""A U-Net through what a model goes through; its transposed convolutions mask by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from zoo import UNet, masked_layers, prune_half

import dst_kernels
from dst_kernels import optim
from dst_kernels.nn import MaskedConvTranspose2d
from dst_kernels.nn.sources import deferral_of


@pytest.fixture
def model():
    return dst_kernels.sparsify_(UNet().double())


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def gradients(model, output):
    model.zero_grad()
    output.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_there_and_back(images):
    dense = UNet().double()
    before = dense(images).detach()
    model = dst_kernels.sparsify_(copy.deepcopy(dense))
    assert [name for name, layer in masked_layers(model).items() if is_transposed(layer)] == [
        "up2",
        "up1",
    ]
    assert torch.equal(model(images), before)
    prune_half(model)
    output = model(images)
    ratio = dst_kernels.remaining_ratio(model).item()
    report = dst_kernels.sparsity_report(model)
    assert 0.3 < ratio < 0.7 and report.remaining_ratio == pytest.approx(ratio)
    model = dst_kernels.finalize_(model)
    assert type(model.up1) is torch.nn.ConvTranspose2d
    assert torch.equal(model(images), output)
    weights = [module.weight for module in model.modules() if hasattr(module, "weight")]
    zeros = sum((weight == 0).sum().item() for weight in weights)
    assert zeros == report.total - report.kept


def is_transposed(layer):
    return isinstance(layer, MaskedConvTranspose2d)


def test_groups_leave_them_alone(model, images):
    prune_half(model)
    expected = gradients(model, model(images))
    dst_kernels.group_(model)
    (hook,) = model._forward_pre_hooks.values()
    output = model(images)
    (forward,) = hook.__self__.kept()
    for layer in masked_layers(model).values():
        assert (layer not in forward.made) == is_transposed(layer)
    torch.testing.assert_close(gradients(model, output), expected)


def test_optimizers_leave_them_exact_gradients(model, images):
    prune_half(model)
    twin = copy.deepcopy(model)
    optimizer = optim.DSTSGD(model, lr=0.1, alpha=0.0)
    for layer in masked_layers(model).values():
        assert (deferral_of(layer) is None) == is_transposed(layer)
    for each in (model, twin):
        each(images).square().sum().backward()
    for name in ("up1", "up2"):
        for parameter in ("weight", "threshold"):
            ours = model.get_parameter(f"{name}.{parameter}").grad
            torch.testing.assert_close(ours, twin.get_parameter(f"{name}.{parameter}").grad)
    optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_checkpoints_and_forwards_before_a_backward(model, images):
    prune_half(model)
    expected = gradients(model, model(images))
    kept = copy.deepcopy(model.state_dict())
    for reentrant in (True, False):
        output = checkpoint(model, images.requires_grad_(), use_reentrant=reentrant)
        torch.testing.assert_close(gradients(model, output), expected)
    first = model(images)
    for layer in masked_layers(model).values():
        if is_transposed(layer):
            layer.reset_threshold(1e3)
    model(images), model(images)  # these commit a reset
    for layer in masked_layers(model).values():
        assert not is_transposed(layer) or not layer.threshold.any()
    torch.testing.assert_close(gradients(model, first), expected)
    model.load_state_dict(kept)
    with dst_kernels.weights_unchanged(model):
        outputs = [model(images) for _ in range(2)]
        again = [3 * gradient for gradient in expected]
        torch.testing.assert_close(gradients(model, outputs[0] * 3**0.5), again)


def test_parameter_groups_have_their_thresholds(model):
    weights, thresholds = dst_kernels.parameter_groups(model)
    assert {id(model.up1.threshold), id(model.up2.threshold)} <= set(map(id, thresholds["params"]))
    assert not {id(p) for p in weights["params"]} & set(map(id, thresholds["params"]))
