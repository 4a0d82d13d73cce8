"""torch.func, functional_call, activation checkpointing, repeated use."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dst_kernels.functional as dst
from dst_kernels.nn import MaskedConv2d, MaskedConvTranspose2d, MaskedLinear

from . import authors

pytestmark = pytest.mark.usefixtures("each_backend")


def leaves():
    return (
        torch.randn(3, 4, 5, 5, requires_grad=True),
        torch.randn(6, 4, 3, 3, requires_grad=True),
        torch.rand(6, requires_grad=True),
        torch.randn(6, requires_grad=True),
    )


def convolved(input, weight, threshold, bias):
    return dst.masked_conv2d(input, weight, threshold, bias, padding="same").tanh()


def transposed(input, weight, threshold, bias):
    weight = weight.transpose(0, 1)
    return dst.masked_conv_transpose2d(input, weight, threshold, bias, stride=2).tanh()


def linear(input, weight, threshold, bias):
    return dst.masked_linear(
        input[:, :, :3, :3].flatten(1), weight.flatten(1), threshold, bias
    ).tanh()


def weighted(input, weight, threshold, bias):
    return (dst.masked_weight(weight, threshold) * bias.view(6, 1, 1, 1)).sin()


FUNCTIONS = pytest.mark.parametrize("run", [convolved, transposed, linear, weighted])


@FUNCTIONS
def test_func_grad(run):
    arguments = leaves()
    expected = torch.autograd.grad(
        run(*arguments).square().sum(), arguments, materialize_grads=True
    )
    result = grad(lambda *a: run(*a).square().sum(), argnums=(0, 1, 2, 3))(*arguments)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (MaskedLinear(5, 4), (2, 5)),
        (MaskedConv2d(3, 4, 3), (2, 3, 5, 5)),
        (MaskedConvTranspose2d(4, 6, 3, groups=2), (2, 4, 3, 3)),
    ],
)
def test_functional_call(layer, shape, training):
    layer.train(training)
    own = {name: p.detach().clone() for name, p in layer.named_parameters()}
    parameters = {name: torch.rand_like(p) for name, p in layer.named_parameters()}
    parameters["threshold"].mul_(0.2)
    before = parameters["threshold"].clone()
    input = torch.randn(shape)

    def loss(parameters):
        return functional_call(layer, parameters, (input,)).square().sum()

    gradients, value = grad_and_value(loss)(parameters)
    required = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    plain = loss(required)
    plain.backward()
    torch.testing.assert_close(value, plain.detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, required[name].grad)
        assert gradient.any()
    assert torch.equal(parameters["threshold"], before), "no reset, so nothing to write"
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, own[name])


@FUNCTIONS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(run, reentrant):
    arguments = leaves()
    expected = torch.autograd.grad(run(*arguments).sum(), arguments, allow_unused=True)
    run_again = checkpoint(run, *arguments, use_reentrant=reentrant)
    run_again.sum().backward()
    for leaf, gradient in zip(arguments, expected, strict=True):
        assert (leaf.grad is None) == (gradient is None)
        if gradient is not None:
            assert torch.equal(leaf.grad, gradient)


def test_one_weight_in_two_places_adds_its_gradients():
    input, weight, threshold, bias = leaves()
    twice = convolved(input, weight, threshold, bias) + 2 * convolved(
        input, weight, threshold, bias
    )
    once = torch.autograd.grad(convolved(input, weight, threshold, bias).sum(), (weight, threshold))
    for a, b in zip(torch.autograd.grad(twice.sum(), (weight, threshold)), once, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_backward_twice_with_a_retained_graph():
    arguments = leaves()
    loss = convolved(*arguments).sum()
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    second = torch.autograd.grad(loss, arguments)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_create_graph_leaves_the_first_gradient_as_it_is():
    arguments = leaves()
    loss = convolved(*arguments).square().sum()
    plain = torch.autograd.grad(loss, arguments, retain_graph=True)
    with_graph = torch.autograd.grad(loss, arguments, create_graph=True)
    for a, b in zip(plain, with_graph, strict=True):
        assert torch.equal(a, b.detach())


def test_gradient_that_is_not_wanted_stays_none_under_create_graph():
    input, weight, threshold, _ = leaves()
    threshold.requires_grad_(False)
    output = dst.masked_conv2d(input, weight, threshold)
    of_input, of_weight = torch.autograd.grad(
        output.square().sum(), (input, weight), create_graph=True
    )
    assert of_input.requires_grad and of_weight.requires_grad
    assert threshold.grad is None


def test_inference_mode_and_no_grad():
    arguments = leaves()
    expected = convolved(*arguments).detach()
    with torch.inference_mode():
        assert torch.equal(convolved(*arguments), expected)
    with torch.no_grad():
        assert torch.equal(convolved(*arguments), expected)


PLAIN = {
    convolved: lambda x, w, b: F.conv2d(x, w, b, padding="same").tanh(),
    transposed: lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b, stride=2).tanh(),
    linear: lambda x, w, b: F.linear(x[:, :, :3, :3].flatten(1), w.flatten(1), b).tanh(),
}


@pytest.mark.parametrize("run", PLAIN)
def test_gradient_penalties_of_the_input(run):
    """Differentiate twice through the input, and once through the mask, by the usual rules."""
    input, weight, threshold, bias = leaves()

    def penalty(output):
        return torch.autograd.grad(output.sum(), input, create_graph=True)[0].square().sum()

    penalty(run(input, weight, threshold, bias)).backward()
    kernel = torch.where(weight.abs() > threshold.view(6, 1, 1, 1), weight, 0).detach()
    penalty(PLAIN[run](input, kernel.requires_grad_(), bias)).backward()
    of_weight, of_threshold = authors.gradients(kernel.grad, weight, threshold)
    torch.testing.assert_close(weight.grad, of_weight.to(weight.dtype), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        threshold.grad, of_threshold.to(threshold.dtype), rtol=1e-5, atol=1e-4
    )
