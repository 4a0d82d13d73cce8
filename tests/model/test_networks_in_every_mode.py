"""Whole convolutional networks trained a step in every mode: the gradients are the reference's.

In float64, where other orders of the same sums differ by less than anything that could be wrong.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import (
    UNet,
    masked_layers,
    mobilenet_v3_small,
    prune_half,
    short_resnet50,
    small_convnext,
)

import dst_kernels
from dst_kernels import optim
from dst_kernels.backends.compiled import library

CPU_LIBRARY = pytest.mark.skipif(library.unavailable("cpu") is not None, reason="it is not built")
LR, MOMENTUM, ALPHA = 0.1, 0.9, 1e-3

# What it is made of, and the side of its images.
NETWORKS = {
    "resnet50": (short_resnet50, 64),
    "mobilenet_v3": (mobilenet_v3_small, 64),
    "convnext": (small_convnext, 64),
    "unet": (UNet, 16),
}
LARGE = ("resnet50", "convnext")  # the others have their kinds of layers, too


def cases(*arguments):
    """Tuples that begin with a network's name; those of the large ones are slow."""
    return [
        pytest.param(*each, marks=pytest.mark.slow if each[0] in LARGE else ())
        for each in arguments
    ]


every_network = pytest.mark.parametrize("name", cases(*((name,) for name in NETWORKS)))


@functools.cache
def dense_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().double().train()


def network(name: str, memory_format=torch.channels_last, **options) -> nn.Module:
    """Half of every filter is pruned, and one layer is about to collapse."""
    model = copy.deepcopy(dense_network(name)).to(memory_format=memory_format)
    model = dst_kernels.sparsify_(model, dst_kernels.SparsifyConfig(**options))
    prune_half(model)
    list(masked_layers(model).values())[1].reset_threshold(1e3)
    return model


def images(name: str, memory_format=torch.channels_last) -> torch.Tensor:
    side = NETWORKS[name][1]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 3, side, side, dtype=torch.float64, generator=generator)
    return drawn.to(memory_format=memory_format)


def loss_of(model: nn.Module, input: torch.Tensor) -> torch.Tensor:
    return F.softplus(model(input)).square().mean()


def backward(model: nn.Module, name: str, step_model=None, **layout) -> nn.Module:
    loss = loss_of(model if step_model is None else step_model, images(name, **layout))
    (loss + ALPHA * dst_kernels.sparse_regularization(model)).backward()
    assert not list(masked_layers(model).values())[1].threshold.any(), "its reset is committed"
    return model


@functools.cache
def reference(name: str) -> nn.Module:
    return backward(network(name, torch.contiguous_format, backend="reference", path="packed"),
                    name, memory_format=torch.contiguous_format)  # fmt: skip


def assert_same(model: nn.Module, expected: nn.Module, of=lambda parameter: parameter.grad) -> None:
    """`of` each parameter, and which thresholds the guard has reset."""
    pairs = list(expected.named_parameters())
    assert len(pairs) == len(list(model.parameters()))
    # Some gradients are zero but for rounding: those of a bias before a normalisation, say.
    largest = max(of(theirs).abs().max().item() for _, theirs in pairs)
    for parameter_name, theirs in pairs:
        ours, truth = of(model.get_parameter(parameter_name)), of(theirs)
        torch.testing.assert_close(
            ours,
            truth,
            rtol=1e-9,
            atol=1e-12 * largest,
            msg=lambda m, n=parameter_name: f"{n}: {m}",
        )
    for (layer_name, ours), theirs in zip(
        masked_layers(model).items(), masked_layers(expected).values(), strict=True
    ):
        assert torch.equal(ours.threshold == 0, theirs.threshold == 0), layer_name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_that_has_a_masked_twin_is_masked(name):
    plan = dst_kernels.plan_sparsify(dense_network(name))
    left = {layer.type for layer in plan.layers if layer.action == "skip"}
    assert left == ({"CNBlock"} if name == "convnext" else set())  # its scale of channels
    kinds = {type(layer).__name__ for layer in masked_layers(network(name)).values()}
    assert kinds - {"MaskedLinear"} == (
        {"MaskedConv2d", "MaskedConvTranspose2d"} if name == "unet" else {"MaskedConv2d"}
    )


@pytest.mark.parametrize(
    ("name", "path"),
    cases(
        *((name, "packed") for name in NETWORKS),
        # With these a transposed convolution would stay dense.
        *(
            (name, path)
            for name in NETWORKS
            if name != "unet"
            for path in ("mixed", "fused", "sparse")
        ),
    ),
)
def test_layer_by_layer_on_the_reference(name, path):
    assert_same(backward(network(name, backend="reference", path=path), name), reference(name))


@CPU_LIBRARY
@every_network
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_layer_by_layer_on_the_cpu_library(name, memory_format):
    model = network(name, memory_format, backend="cpu")
    assert_same(backward(model, name, memory_format=memory_format), reference(name))


@every_network
def test_grouped(name):
    assert_same(backward(dst_kernels.group_(network(name)), name), reference(name))


@every_network
@pytest.mark.slow
def test_compiled(name):
    model = network(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    try:
        assert_same(backward(model, name, compiled), reference(name))
    finally:
        torch._dynamo.reset()


@every_network
def test_a_step_of_the_deferred_optimizer(name):
    """Its gradients are made in the step, so what the step makes of the weights is compared."""
    ours = network(name)
    options = {"lr": LR, "momentum": MOMENTUM}
    optimizer = optim.DSTSGD(ours, **options, alpha=ALPHA)
    loss_of(ours, images(name)).backward()
    optimizer.step()
    expected = copy.deepcopy(reference(name))
    for copied, original in zip(expected.parameters(), reference(name).parameters(), strict=True):
        copied.grad = original.grad
    torch.optim.SGD(dst_kernels.parameter_groups(expected), **options).step()
    assert_same(ours, expected, of=lambda parameter: parameter.detach())
