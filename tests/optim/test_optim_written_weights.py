"""Weights written through `.data`, as averages, swaps and clamps do: no version tells of it."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import conv2d, linear, other_granularities, with_dense_layers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from twins import Twins, assert_close, batches

import dst_kernels
from dst_kernels.nn import MaskedConv2d, MaskedLinear

OPTIONS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "alpha": 0.05},
    "adamw": {"lr": 0.02, "weight_decay": 0.1, "alpha": 0.05},
}
every_rule = pytest.mark.parametrize("rule", OPTIONS)
SCOPES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.fixture
def backend(best_backend):
    return best_backend


def trained(backend, rule="sgd", network=linear, steps=3, **options):
    torch.manual_seed(1)
    model, shape = network(backend=backend)
    twins = Twins(model, rule, backend=backend, **{**OPTIONS[rule], **options})
    data = batches(shape)
    twins.train(data, steps)
    return twins, data


def other_weights(model):
    """Return a copy that masks layer by layer, with other weights, a third of them pruned."""
    other = dst_kernels.ungroup_(copy.deepcopy(model))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            low, high = (0.0, 0.2) if "threshold" in name else (-0.3, 0.3)
            parameter.uniform_(low, high)
    return other


def write(model, source):
    for parameter, value in zip(model.parameters(), source.parameters(), strict=True):
        parameter.data.copy_(value.data)


def by_hand(model, x):
    """Compute the output of a Sequential from W * M, written out."""
    for layer in model:
        if isinstance(layer, MaskedLinear | MaskedConv2d):
            threshold = layer.threshold.detach()
            if threshold.shape != layer.weight.shape:
                threshold = threshold.reshape(-1, *[1] * (layer.weight.dim() - 1))
            masked = layer.weight.detach() * (layer.weight.detach().abs() > threshold)
            if isinstance(layer, MaskedLinear):
                x = nn.functional.linear(x, masked, layer.bias)
            else:
                x = layer.dense_type._conv_forward(layer, x, masked, layer.bias)
        else:
            x = layer(x)
    return x.detach()


# -- evaluation --------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("network", [linear, conv2d, with_dense_layers, other_granularities])
@pytest.mark.parametrize("looked_before", [False, True])
def test_evaluation_has_the_written_weights(rule, scope, network, looked_before, backend):
    """Needs no call that says so, and no step, before or after an evaluation of others."""
    twins, data = trained(backend, rule, network)
    model, x = twins.ours.model, data[0][0]
    model.eval()
    for seed in range(2):
        other = other_weights(model).eval()
        if looked_before:
            with scope():
                model(x)
        write(model, other)
        with scope():
            assert_close(model(x).clone(), by_hand(other, x), f"output {seed}")
        model(x).square().mean().backward()
        twins.ours.optimizer.step()


@every_rule
@pytest.mark.parametrize("scope", ["no_grad", "inference_mode"])
def test_training_mode_without_gradients_has_the_written_weights(rule, scope, backend):
    twins, data = trained(backend, rule)
    other = other_weights(twins.ours.model)
    write(twins.ours.model, other)
    with SCOPES[scope]():
        assert_close(twins.ours.model(data[0][0]).clone(), by_hand(other, data[0][0]), "output")


def test_a_scope_opened_after_the_write_has_the_written_weights(backend):
    twins, data = trained(backend)
    model, x = twins.ours.model.eval(), data[0][0]
    with torch.no_grad(), dst_kernels.weights_unchanged(model):
        model(x)
    other = other_weights(model).eval()
    write(model, other)
    with torch.no_grad(), dst_kernels.weights_unchanged(model):
        for _ in range(2):
            assert_close(model(x), by_hand(other, x), "output")
    assert_close(model(x), by_hand(other, x), "output after the scope")


@every_rule
def test_weights_swapped_in_for_an_evaluation_and_out_again(rule, backend):
    """Leaves no trace in the training."""
    twins, data = trained(backend, rule)
    for step in range(3):
        model = twins.ours.model
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        other = other_weights(model).eval()
        write(model, other)
        model.eval()
        with torch.no_grad():
            assert_close(model(data[0][0]), by_hand(other, data[0][0]), "output")
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(value)
        model.train()
        twins.train(data[step:], 1)
    twins.assert_same(data[0][0])


@every_rule
def test_averages_of_weights(rule, backend):
    """Act in the averaged model, and in the trained one once they are written to it."""
    twins, data = trained(backend, rule)
    model = twins.ours.model
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    by_formula = None
    for step in range(4):
        twins.train(data[step:], 1)
        averaged.update_parameters(model)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        by_formula = now if by_formula is None else torch._foreach_lerp(by_formula, now, 0.5)
    for parameter, value in zip(averaged.module.parameters(), by_formula, strict=True):
        assert_close(parameter, value, "average")
    averaged.eval()
    with torch.no_grad():
        x = data[0][0]
        assert_close(averaged(x), by_hand(averaged.module, x), "output of the average")
        write(model, averaged.module)
        assert_close(model.eval()(x), by_hand(averaged.module, x), "output of the model")


def test_statistics_of_written_weights(backend):
    """Are those that batch normalisation sees in training mode without gradients."""
    twins, data = trained(backend, network=with_dense_layers)
    other = other_weights(twins.ours.model)
    twins.both(lambda side: write(side.model, other))
    twins.both(lambda side: update_bn([x for x, _ in data], side.model))
    assert_close(*twins.both(lambda side: side.model[1].running_var), "running variance")
    assert_close(*twins.both(lambda side: side.model[1].running_mean), "running mean")


# -- training ----------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("network", [linear, conv2d, other_granularities])
@pytest.mark.parametrize("what", ["weight", "threshold", ""], ids=["weights", "thresholds", "all"])
def test_refresh_says_that_weights_were_written(rule, network, what, backend):
    """Gives the trajectory of torch.optim with the same writes between steps."""
    twins, data = trained(backend, rule, network)

    def clamp(side):
        for name, parameter in side.model.named_parameters():
            if what not in name:
                continue
            if "threshold" in name:  # no clamp, as deferred resets are committed earlier
                parameter.data.copy_(
                    torch.linspace(0, 0.1, len(parameter.flatten())).view_as(parameter)
                )
            else:
                parameter.data.mul_(0.8).clamp_(-0.15, 0.15)

    for step in range(6):
        twins.both(clamp)
        assert twins.ours.optimizer.refresh() is None
        twins.train(data[step % 4 :], 1)
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("steps", [0, 2])
def test_refresh_at_other_times(steps, backend):
    """Works before a first step, twice, before the write, and after a release."""
    twins, data = trained(backend, steps=steps)
    other = other_weights(twins.ours.model)
    optimizer = twins.ours.optimizer
    for _ in range(2):
        optimizer.refresh()
        optimizer.refresh()
        twins.both(lambda side: write(side.model, other))
        optimizer.refresh()
        twins.train(data, 2)
        twins.both(lambda side: side.optimizer.load_state_dict(side.optimizer.state_dict()))
    twins.assert_same(data[0][0])
    optimizer.release()
    optimizer.refresh()


@every_rule
def test_training_in_evaluation_mode_needs_no_refresh(rule, backend):
    twins, data = trained(backend, rule)
    twins.both(lambda side: side.model.eval())
    other = other_weights(twins.ours.model)
    twins.train(data, 2)
    twins.both(lambda side: write(side.model, other))
    twins.train(data, 3)
    twins.assert_same(data[0][0])
