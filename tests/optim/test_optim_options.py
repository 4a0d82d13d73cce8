"""Every option of the two rules: momentum and its kin, groups, schedulers, alpha, closures."""

from __future__ import annotations

import pytest
import torch
from networks import linear, other_granularities, with_dense_layers
from twins import Twins, assert_close, batches, masked_layers

import dst_kernels

STEPS = 20


def run(backend, rule="sgd", network=linear, each_step=None, steps=STEPS, **options):
    """`each_step(twins, index)` before each step."""
    model, shape = network(backend=backend)
    twins = Twins(model, rule, backend=backend, **options)
    data = batches(shape)

    def before(step):
        if step == steps // 2:
            twins.on_models(lambda model: masked_layers(model)[0].reset_threshold(3.0))
        if each_step is not None:
            each_step(twins, step)

    twins.train(data, steps, before)
    twins.assert_same(data[0][0])
    return twins


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
        {"momentum": 0.5, "dampening": 0.4, "weight_decay": 0.02, "maximize": True},
        {"maximize": True},
        {"weight_decay": 0.02},
        {"lr": 0.0, "momentum": 0.9},
        {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9},
    ],
    ids=str,
)
def test_options_of_sgd(options, backend):
    run(backend, **{"lr": 0.05, "alpha": 0.02, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.0)},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"weight_decay": 0.0},
        {"weight_decay": 0.3, "maximize": True},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
    ],
    ids=str,
)
def test_options_of_adamw(options, backend):
    run(backend, "adamw", **{"lr": 0.01, "alpha": 0.02, **options})


def test_the_defaults_are_those_of_torch():
    for ours, theirs in (
        (dst_kernels.optim.DSTSGD, torch.optim.SGD),
        (dst_kernels.optim.DSTAdamW, torch.optim.AdamW),
    ):
        model, _ = linear()
        mine, yours = ours(model).defaults, theirs(model.parameters()).defaults
        shared = mine.keys() - {"alpha"}
        assert {key: mine[key] for key in shared} == {key: yours[key] for key in shared}


def own_groups(model):
    """The first layer by itself, decay for the thresholds of the others, alpha for some."""
    first, *others = masked_layers(model)
    thresholds = [layer.threshold for layer in others]
    named = {id(p) for p in [*first.parameters(), *thresholds]}
    return [
        {"params": list(first.parameters()), "lr": 0.01, "alpha": 0.1, "weight_decay": 0.03},
        {"params": thresholds, "alpha": 0.02, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if id(p) not in named]},
    ]


def one_group(model):
    return [{"params": list(model.parameters())}]


@pytest.mark.parametrize("network", [linear, with_dense_layers, other_granularities])
@pytest.mark.parametrize("groups", [own_groups, one_group])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_groups(rule, groups, network, backend):
    run(backend, rule, network, groups=groups, lr=0.02, alpha=0.05, weight_decay=0.02)


def test_groups_with_rules_of_their_own(backend):
    """Momentum in one group only, so that only some parameters have state."""

    def groups(model):
        first, second, third = own_groups(model)
        return [
            {**first, "momentum": 0.9, "nesterov": True},
            {**second, "maximize": True},
            {**third, "momentum": 0.5, "dampening": 0.1},
        ]

    run(backend, groups=groups, lr=0.02)


@pytest.mark.parametrize("method", ["parameters", "named_parameters"])
def test_parameters_from_generators(method, backend):
    def groups(model):
        return [{"params": getattr(model, method)()}]

    twins = run(backend, groups=groups, alpha=0.1, lr=0.1, steps=4)
    assert ("param_names" in twins.ours.optimizer.param_groups[0]) == method.startswith("named")


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 5, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS + 1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    ],
    ids=["StepLR", "OneCycleLR", "CosineAnnealingLR"],
)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_schedulers(rule, make, backend):
    """OneCycleLR changes momentum and betas, too."""
    options = {"lr": 0.1, "alpha": 0.02, **({"momentum": 0.9} if rule == "sgd" else {})}
    model, shape = linear(backend=backend)
    twins = Twins(model, rule, backend=backend, **options)
    schedulers = twins.both(lambda side: make(side.optimizer))
    for i in range(STEPS):
        twins.step(*batches(shape)[i % 4])
        for scheduler in schedulers:
            scheduler.step()
    twins.assert_same(batches(shape)[0][0])


def test_options_changed_between_steps(backend):
    """By hand, as schedulers do: momentum comes and goes, which makes and leaves state."""

    def change(twins, step):
        for group in (g for side in twins.sides for g in side.optimizer.param_groups):
            group["lr"] = 0.1 / (step + 1)
            group["momentum"] = (0.0, 0.9, 0.5)[step // 3 % 3]
            group["weight_decay"] = 0.01 * (step % 2)
            group["maximize"] = step % 5 == 4

    run(backend, lr=0.1, alpha=0.02, each_step=change)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("network", [linear, other_granularities])
@pytest.mark.parametrize(
    "alpha", [0.05, torch.tensor(0.05, dtype=torch.float64), 0.0, None], ids=str
)
def test_alpha(alpha, network, rule, backend):
    run(backend, rule, network, lr=0.02, alpha=alpha)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_regularizer_left_in_the_loss(rule, backend):
    twins = run(backend, rule, lr=0.02, alpha=0.05, alpha_in_loss=True)
    assert all(layer.threshold.grad is not None for layer in masked_layers(twins.ours.model))


def test_alpha_changed_between_steps(backend):
    """In one group: numbers, a tensor, None and back; and a tensor that is changed in place."""
    tensor = torch.tensor(0.3, dtype=torch.float64)
    values = 0.1, tensor, None, 0.0, 0.2

    def change(twins, step):
        if step % 4 == 0:
            twins.ours.optimizer.param_groups[1]["alpha"] = values[step // 4 % 5]
        tensor.mul_(0.9)

    run(backend, lr=0.05, momentum=0.9, alpha=0.1, each_step=change)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_closures(rule, backend):
    """Run with gradients, and their result is returned."""
    model, shape = linear(backend=backend)
    twins = Twins(model, rule, backend=backend, lr=0.05, alpha=0.02)
    for input, target in batches(shape):
        losses = []
        for side in twins.sides:

            def closure(side=side, input=input, target=target):
                assert torch.is_grad_enabled()
                side.optimizer.zero_grad()
                loss = side.loss(input, target)
                (loss + side.regularizer(twins.alphas)).backward()
                return loss

            losses.append(side.optimizer.step(closure))
        assert_close(*losses, "loss")
    twins.assert_same(batches(shape)[0][0])


def test_hooks_of_the_step(backend):
    model, shape = linear(backend=backend)
    twins = Twins(model, backend=backend, lr=0.05)
    seen = []
    twins.ours.optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    twins.ours.optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    twins.train(batches(shape), 2)
    assert seen == ["before", "after"] * 2
