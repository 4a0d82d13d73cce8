"""Layers masked together: the numbers of layer by layer, in one launch a bucket."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import dst_kernels
import dst_kernels.autograd.weights as grouping
from dst_kernels.backends import unavailable
from dst_kernels.nn import MaskedLayer, MaskedLinear

BACKENDS = [name for name in ("reference", "cpu") if unavailable(name, torch.device("cpu")) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
ALPHA = 0.01


def network(backend="reference", dtype=torch.float32, bias=True, **options):
    """Convolutions and linear layers, one of them dense, in evaluation order."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 20, bias=bias),
        nn.ReLU(),
        nn.Linear(20, 5, bias=bias),
    ).to(dtype)
    config = dst_kernels.SparsifyConfig(backend=backend, **options)
    model = dst_kernels.sparsify_(model, config)
    with torch.no_grad():
        for layer in masked_layers(model):
            layer.threshold.uniform_(0, 0.05)
    return model


def masked_layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def groups_of(model):
    return [hook.__self__ for hook in model._forward_pre_hooks.values()]


def images(seed, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad)


def train(model, forward=None, steps=20, autocast=False):
    forward = model if forward is None else forward
    groups = dst_kernels.parameter_groups(model, threshold_lr=0.05)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        if step == 8:  # the guard resets a layer
            with torch.no_grad():
                masked_layers(model)[2].threshold.fill_(5.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = forward(images(step, dtype))
        loss = output.float().square().mean() if autocast else output.square().mean()
        (loss + ALPHA * dst_kernels.sparse_regularization(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert masked_layers(model)[2].threshold.max() < 1, "the reset happened"
    return model


def assert_equal_states(actual, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


def backward(*models, steps=1):
    for model in models:
        for step in range(steps):
            model(images(step)).square().mean().backward()


def assert_equal_gradients(actual, expected):
    for ours, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.fixture
def launches(monkeypatch):
    """How often the multi-tensor operations run, and over how many tensors."""
    counts = Counter()
    find = grouping.implementation

    def counting(backend, device, op, **options):
        function = find(backend, device, op, **options)

        def count(tensors, *args):
            counts[op] += 1
            counts[op, "tensors"] += len(tensors)
            return function(tensors, *args)

        return count

    monkeypatch.setattr(grouping, "implementation", counting)
    return counts


PACK, POST = "masked_weights", "masked_weights_backward"


# -- the same numbers --------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("bucket_mb", [25, 0.025])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_trajectories_are_equal_to_the_bit(backend, bucket_mb, autocast, granularity):
    """Without biases, whose gradients torch sums in its own way."""
    plain = train(network(backend, bias=False, granularity=granularity), autocast=autocast)
    grouped = dst_kernels.group_(network(backend, bias=False, granularity=granularity), bucket_mb)
    assert_equal_states(train(grouped, autocast=autocast), plain)


@every_backend
def test_trajectories_with_biases_in_float64(backend):
    plain = train(network(backend, torch.float64))
    grouped = train(dst_kernels.group_(network(backend, torch.float64)))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(grouped.state_dict()[name], value, rtol=1e-12, atol=1e-13)


@every_backend
def test_gradients_of_weights_and_thresholds_with_biases(backend):
    plain, grouped = network(backend), dst_kernels.group_(network(backend))
    backward(plain, grouped)
    for expected, actual in zip(masked_layers(plain), masked_layers(grouped), strict=True):
        assert torch.equal(actual.weight.grad, expected.weight.grad)
        assert torch.equal(actual.threshold.grad, expected.threshold.grad)
        torch.testing.assert_close(actual.bias.grad, expected.bias.grad)


@every_backend
def test_options_that_differ_from_layer_to_layer_and_micro_batches(backend):
    def mixed():
        model = network(backend, bias=False)
        first, second, third, fourth = masked_layers(model)
        first.surrogate, second.structure_gradient = "triangular", False
        third.reset_ratio, fourth.surrogate = None, "straight_through"
        return model

    plain, grouped = mixed(), dst_kernels.group_(mixed())
    backward(plain, grouped, steps=3)
    assert_equal_gradients(grouped, plain)


# -- how often ---------------------------------------------------------------------------------


def test_one_launch_for_all_layers_and_nothing_kept_after_backward(launches):
    model = dst_kernels.group_(network())
    (group,) = groups_of(model)
    output = model(images(0))
    assert [list(forward.made) for forward in group.kept()] == [masked_layers(model)]
    output.sum().backward()
    assert not group.kept()
    assert launches == {PACK: 1, (PACK, "tensors"): 4, POST: 1, (POST, "tensors"): 4}


def test_buckets_and_layers_that_fill_one(launches):
    """Weights of 864, 2,304, 23,040 and 400 bytes: the third goes by itself."""
    model = dst_kernels.group_(network(), bucket_mb=2400 / 2**20)
    model(images(0)).sum().backward()
    assert launches == {PACK: 3, (PACK, "tensors"): 3, POST: 3, (POST, "tensors"): 3}


def test_gradients_of_the_last_bucket_come_first():
    model = dst_kernels.group_(network(), bucket_mb=24000 / 2**20)
    order = []
    for i, layer in enumerate(masked_layers(model)):
        layer.weight.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    model(images(0)).sum().backward()
    assert sorted(order[:2]) == [2, 3] and sorted(order[2:]) == [0, 1]


def test_evaluation_masks_once_and_keeps_nothing(launches):
    model = dst_kernels.group_(network().eval())
    thresholds = [layer.threshold.clone() for layer in masked_layers(model)]
    with torch.no_grad():
        expected = network().eval()(images(0))
        assert torch.equal(model(images(0)), expected)
    with torch.inference_mode():
        assert torch.equal(model(images(0)), expected)
    assert launches[PACK] == 2 and launches[POST] == 0
    assert not any(group.kept() for group in groups_of(model)), "nothing will be recomputed"
    for layer, threshold in zip(masked_layers(model), thresholds, strict=True):
        assert torch.equal(layer.threshold, threshold)
    model.train()
    model(images(0)).sum().backward()  # also after an inference_mode


def test_only_training_layers_commit_a_reset():
    model = dst_kernels.group_(network())
    layers = masked_layers(model)
    with torch.no_grad():
        for layer in layers:
            layer.threshold.fill_(5.0)
    layers[1].eval()
    model(images(0))
    assert [layer.threshold.max().item() for layer in layers] == [0, 5, 0, 0]


# -- parts of a model --------------------------------------------------------------------------


def test_two_forwards_before_their_backwards():
    plain, grouped = network(bias=False), dst_kernels.group_(network(bias=False))
    for model in (plain, grouped):
        losses = [model(images(step)).square().mean() for step in range(2)]
        for loss in losses:
            loss.backward()
    assert_equal_gradients(grouped, plain)


@pytest.mark.parametrize("frozen", ["weight", "threshold", "both"])
def test_frozen_layers(frozen, launches):
    def model():
        model = network(bias=False)
        layer = masked_layers(model)[1]
        layer.weight.requires_grad_(frozen == "threshold")
        layer.threshold.requires_grad_(frozen == "weight")
        return model

    plain, grouped = model(), dst_kernels.group_(model())
    backward(plain, grouped)
    assert_equal_gradients(grouped, plain)
    assert launches[POST, "tensors"] == (4 if frozen == "threshold" else 3)


class Branching(nn.Module):
    """The first layer twice, the last not at all unless asked for."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([MaskedLinear(6, 6) for _ in range(3)]).to(dtype)

    def forward(self, x, everything=False):
        x = self.layers[0](self.layers[1](self.layers[0](x).relu()).relu())
        return self.layers[2](x) if everything else x


def test_layers_used_twice_and_not_at_all():
    plain, grouped = Branching(), dst_kernels.group_(Branching())
    x = torch.randn(5, 6, dtype=torch.float64)
    for model in (plain, grouped):
        model(x).square().mean().backward()
    for (name, expected), actual in zip(
        plain.named_parameters(), grouped.parameters(), strict=True
    ):
        if name.startswith("layers.2"):
            assert expected.grad is None and actual.grad is None
        else:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_layers_that_share_a_weight():
    def tied():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        model[2].weight = model[0].weight
        return dst_kernels.sparsify_(model)

    plain, grouped = tied(), dst_kernels.group_(tied())
    for each in (plain[2].bias, grouped[2].bias, plain[0].bias, grouped[0].bias):
        nn.init.zeros_(each)
    for model in (plain, grouped):
        model(torch.ones(3, 6, dtype=torch.float64)).square().mean().backward()
    torch.testing.assert_close(grouped[0].weight.grad, plain[0].weight.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        grouped[0].threshold.grad, plain[0].threshold.grad, rtol=1e-12, atol=0
    )


# -- who calls ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = network(bias=False), reentrant

    def forward(self, x):
        x = checkpoint(self.inner[:4], x, use_reentrant=self.reentrant)
        x = checkpoint(self.inner[4:7], x, use_reentrant=self.reentrant)
        return self.inner[7](x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain, grouped = network(bias=False), dst_kernels.group_(Checkpointed(reentrant))
    for step in range(3):
        for model in (plain, grouped):
            model(images(step, requires_grad=True)).square().mean().backward()
    assert_equal_gradients(grouped, plain)


def test_compiled_models_mask_layer_by_layer(launches):
    torch._dynamo.reset()
    plain, grouped = network(bias=False), dst_kernels.group_(network(bias=False))
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    assert_equal_states(train(grouped, compiled, steps=10), train(plain, steps=10))
    assert not launches
    grouped(images(0)).sum().backward()
    assert launches[PACK] == 1, "eager calls of the same model are grouped"
    torch._dynamo.reset()


def test_layers_called_outside_the_forward_go_by_themselves():
    model, alone = dst_kernels.group_(network()), network()
    model(images(0))  # leaves masked weights, which the next lines must not use
    with torch.no_grad():
        for each in (model, alone):
            each[7].weight.data.neg_()  # which no version counter sees
    x = torch.randn(2, 20)
    assert torch.equal(model[7](x), alone[7](x))


def test_swapped_parameters_are_seen():
    model, x = dst_kernels.group_(network().eval()), images(0)
    swapped = {name: value.detach() * 2 for name, value in model.named_parameters()}
    expected = functional_call(network().eval(), swapped, (x,))
    assert torch.equal(functional_call(model, swapped, (x,)), expected)


def test_functional_gradients():
    model, x = dst_kernels.group_(network()), images(0)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    loss = lambda values: functional_call(model, values, (x,)).square().mean()  # noqa: E731
    grads = torch.func.grad(loss)(parameters)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_weights_changed_within_a_forward_are_seen():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = MaskedLinear(4, 4)

        def forward(self, x):
            x = self.layer(x)
            with torch.no_grad():
                self.layer.weight.mul_(2)
            return self.layer(x)

    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(dst_kernels.group_(Changing())(x), Changing()(x))


def test_autocast_switched_within_a_forward():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(bias=False)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.inner[:5](x)
            with torch.autocast("cpu", enabled=False):
                return self.inner[5:](x.float())

    plain, grouped = Mixed(), dst_kernels.group_(Mixed())
    for model in (plain, grouped):
        with torch.autocast("cpu", torch.bfloat16):
            model(images(0)).square().mean().backward()
    assert_equal_gradients(grouped, plain)


@every_backend
def test_backward_inside_the_autocast_region(backend, monkeypatch):
    """Neither autocast nor autograd reaches into the multi-tensor operations."""
    states, find = [], grouping.implementation

    def watching(*args, **options):
        function = find(*args, **options)

        def watched(*args):
            states.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return function(*args)

        return watched

    monkeypatch.setattr(grouping, "implementation", watching)
    inside, outside = (dst_kernels.group_(network(backend)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside(images(0)).float().square().mean().backward()
        assert torch.is_autocast_enabled("cpu")
        loss = outside(images(0)).float().square().mean()
    loss.backward()
    assert states == [(False, False)] * 4
    assert_equal_gradients(inside, outside)


def test_a_wrong_dtype_is_the_layers_own_error():
    model = dst_kernels.group_(nn.Sequential(MaskedLinear(4, 4)))
    with pytest.raises(TypeError, match="input must have the weight's dtype"):
        model(torch.randn(2, 4).double())
    model(torch.randn(2, 4)).sum().backward()  # goes on after the exception


def test_inside_weights_unchanged_layers_keep_their_copies(launches):
    plain, grouped = network(bias=False), dst_kernels.group_(network(bias=False))
    for model in (plain, grouped):
        with dst_kernels.weights_unchanged(model):
            for step in range(2):
                model(images(step)).square().mean().backward()
    assert not launches
    assert_equal_gradients(grouped, plain)


def test_fused_layers_go_by_themselves(launches):
    model = network()
    masked_layers(model)[3].path = "fused"
    dst_kernels.group_(model)(images(0)).sum().backward()
    assert launches[PACK, "tensors"] == 3


# -- the group itself --------------------------------------------------------------------------


def test_changes_of_the_model_are_followed(launches):
    model = dst_kernels.group_(network())
    model(images(0))
    model.double()
    assert model(images(0, torch.float64)).dtype == torch.float64
    masked_layers(model)[0].path = "fused"
    model(images(0, torch.float64))
    assert launches[PACK, "tensors"] == 4 + 4 + 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_grouped_on_their_own(copied, launches):
    model = dst_kernels.group_(network())
    output = model(images(0))
    twin = copied(model)  # between forward and backward
    with torch.no_grad():
        masked_layers(twin)[0].weight.zero_()
    assert not torch.equal(twin(images(0)), output)
    assert launches[PACK] == 2
    output.sum().backward()


def test_grouping_again_and_undoing_it(launches):
    model = dst_kernels.group_(dst_kernels.group_(network(), bucket_mb=0.001))
    model(images(0))
    assert launches[PACK] == 1, "the second call replaced the first"
    assert dst_kernels.ungroup_(model) is model
    model(images(0))
    assert launches[PACK] == 1
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_groups_within_groups():
    model = network(bias=False)
    dst_kernels.group_(model[:4])
    inner, outer = nn.Sequential(dst_kernels.group_(network(bias=False))), network(bias=False)
    backward(dst_kernels.group_(inner), outer)
    assert_equal_gradients(inner, outer)


def test_finalized_models_have_no_masks_left():
    model = dst_kernels.group_(network().eval())
    expected = model(images(0))
    final = dst_kernels.finalize_(model)
    torch.testing.assert_close(final(images(0)), expected)
    assert not masked_layers(final) and not final._forward_pre_hooks


def test_bad_input():
    with pytest.raises(ValueError, match=r"Sequential.* has no masked layers"):
        dst_kernels.group_(nn.Sequential(nn.Linear(2, 2)))
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="bucket_mb must be positive"):
            dst_kernels.group_(network(), bucket_mb=value)
