"""Random models with random events: layer by layer, grouped and deferred train alike.

A seed that fails is run again by `pytest "tests/optim/test_random_models.py::test_all_ways[7]"`.
"""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from random_models import RandomNetwork, data_for
from torch import Tensor, nn
from torch.nn import functional as F
from twins import RULES

import dst_kernels
from dst_kernels.nn import MaskedLayer

STEPS, TOLERANCE = 12, 1e-12
FIRST_TIER, ALL = 16, 200


class Way:
    """A model and its optimizer."""

    def __init__(self, name: str, model: nn.Module, make_optimizer) -> None:
        self.name, self.model = name, model
        self.make_optimizer = make_optimizer
        self.optimizer = make_optimizer(model)

    def write(self, names: list[str], change, through_data: bool) -> None:
        for name, parameter in self.model.named_parameters():
            if name in names:
                if through_data and not self.must_see_writes:
                    change(parameter.data)
                else:
                    with torch.no_grad():
                        change(parameter)
        if through_data and hasattr(self.optimizer, "refresh"):
            self.optimizer.refresh()

    @property
    def must_see_writes(self) -> bool:
        return self.name == "deferred" and not hasattr(self.optimizer, "refresh")


class Trial:
    """One random model in three ways, and what happens to it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.chance = random.Random(seed)
        model = RandomNetwork(self.chance)
        self.data = data_for(model)
        self.alpha = self.chance.choice([None, 0.01, 0.1])
        self.events: list[str] = []
        deferred, plain = RULES[rule := self.chance.choice(sorted(RULES))]
        options = _update_options(rule, self.chance)
        groups = self.chance.choice([dst_kernels.parameter_groups, lambda m: list(m.parameters())])
        models = [model, dst_kernels.group_(copy.deepcopy(model)), copy.deepcopy(model)]
        bucket_mb = self.chance.choice([25, 0.0005])

        def of_torch(model):
            return plain(groups(model), **options)

        def of_ours(model):
            return deferred(model, groups(model), alpha=self.alpha, bucket_mb=bucket_mb, **options)

        makers = of_torch, of_torch, of_ours
        names = "layer by layer", "grouped", "deferred"
        self.ways = [Way(*each) for each in zip(names, models, makers, strict=True)]
        self.saved = None

    def run(self) -> None:
        for step in range(STEPS):
            for _ in range(self.chance.choice([1, 2, 2, 3])):
                event = self.chance.choice(EVENTS)
                self.events.append(f"{event.__name__} before step {step}")
                event(self)
            self.step(step)
        self.compare()

    def each(self, act) -> None:
        for way in self.ways:
            act(way)

    def close(self, values: list[Tensor], what: str) -> None:
        """Compare with the first way, to 1e-12 of the largest element or of a thousandth."""
        scale = max(1e-3, values[0].abs().max().item())
        for way, value in zip(self.ways[1:], values[1:], strict=True):
            torch.testing.assert_close(
                value, values[0], rtol=TOLERANCE, atol=TOLERANCE * scale,
                msg=lambda m, way=way: f"{what}, {way.name}, after {self.events}: {m}",
            )  # fmt: skip

    # -- training ------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        batches = [
            self.data[(step + i) % len(self.data)] for i in range(self.chance.choice([1, 1, 3]))
        ]
        unchanged, look = self.chance.random() < 0.3, self.chance.random() < 0.2
        if not self.ways[0].model.training:
            self.settle()  # a step commits a reset, which training in evaluation mode does not
        name, change = "layers.0.weight", self.chance.random() < 0.5  # which is noticed, too
        losses, outputs = [], []
        for way in self.ways:
            way.optimizer.zero_grad()
            with contextlib.ExitStack() as scope:
                if unchanged:  # the step within is noticed
                    scope.enter_context(dst_kernels.weights_unchanged(way.model))
                losses.append(
                    sum(self.backward(way, *batch, len(batches), look) for batch in batches)
                )
                if self.alpha is not None and way.name != "deferred":
                    penalty = self.alpha * _regularizer(way.model)
                    if penalty.requires_grad:
                        penalty.backward()
                way.optimizer.step()
                if unchanged:
                    if change:
                        way.write([name], lambda p: p.mul_(1.1), through_data=False)
                    with torch.no_grad():
                        outputs.append(way.model(self.data[0][0]))
        self.close(losses, f"loss of step {step}")
        if unchanged:
            self.close(outputs, f"output after step {step}")

    def backward(self, way: Way, x: Tensor, target: Tensor, count: int, look: bool) -> Tensor:
        loss = F.cross_entropy(way.model(x), target) / count
        if look:
            with torch.no_grad():
                way.model(self.data[0][0])
        loss.backward()
        return loss.detach()

    def settle(self) -> None:
        """Commit resets that wait for a forward; a deferred step has committed its own."""
        probe = copy.deepcopy(self.ways[0].model).train()
        with torch.no_grad():
            probe(self.data[0][0])
        pairs = zip(probe.named_parameters(), self.ways[0].model.parameters(), strict=True)
        if any(not torch.equal(after, before) for (_, after), before in pairs):
            for way in self.ways:
                training = way.model.training
                with torch.no_grad():
                    way.model.train()(self.data[0][0])
                way.model.train(training)

    def compare(self) -> None:
        outputs = []
        for way in self.ways:
            with torch.no_grad():
                outputs.append(way.model.train()(self.data[0][0]))
        self.close(outputs, "output")
        states = [way.model.state_dict() for way in self.ways]
        for name in states[0]:
            self.close([state[name] for state in states], name)
        kept = [way.optimizer.state_dict()["state"] for way in self.ways]
        for index, state in kept[0].items():
            for key, value in state.items():
                if value is not None:
                    self.close([each[index][key] for each in kept], f"{key} of parameter {index}")
        assert len({len([s for s in each.values() if s]) for each in kept}) == 1

    # -- events --------------------------------------------------------------------------------

    def evaluation(self) -> None:
        scope = self.chance.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
        outputs = []
        for way in self.ways:
            training = way.model.training
            with scope():
                outputs.append(way.model.eval()(self.data[1][0]).clone())
            way.model.train(training)
        self.close(outputs, "output in evaluation mode")

    def forward_without_gradients(self) -> None:
        scope = self.chance.choice([torch.no_grad, torch.inference_mode])
        outputs = []
        for way in self.ways:
            with scope():
                outputs.append(way.model(self.data[2][0]).clone())
        self.close(outputs, "output without gradients")

    def forward_without_backward(self) -> None:
        self.each(lambda way: way.model(self.data[3][0]))

    def switch_mode(self) -> None:
        training = self.chance.random() < 0.6
        self.each(lambda way: way.model.train(training))

    def save_or_load_the_model(self) -> None:
        self.settle()
        if self.saved is None:
            self.saved = [copy.deepcopy(way.model.state_dict()) for way in self.ways]
        else:
            for way, state in zip(self.ways, self.saved, strict=True):
                way.model.load_state_dict(state)

    def write(self) -> None:
        """Change one of the parameters, or all, in place or through `.data`."""
        self.settle()
        names = [name for name, _ in self.ways[0].model.named_parameters()]
        names = self.chance.choice([names, [self.chance.choice(names)]])
        factor, through_data = self.chance.uniform(0.7, 1.3), self.chance.random() < 0.5
        self.each(lambda way: way.write(names, lambda p: p.mul_(factor), through_data))

    def collapse(self) -> None:
        """Raise thresholds so that the guard acts, or a layer without one is empty."""
        self.settle()
        names = [name for name, _ in self.ways[0].model.named_parameters() if "threshold" in name]
        if names:
            value, through_data = self.chance.choice([0.2, 3.0]), self.chance.random() < 0.5
            names = [self.chance.choice(names)]
            self.each(lambda way: way.write(names, lambda p: p.fill_(value), through_data))

    def freeze_or_unfreeze(self) -> None:
        names = [name for name, _ in self.ways[0].model.named_parameters()]
        chosen, on = self.chance.choice(names[:-2] or names), self.chance.random() < 0.6

        def change(way: Way) -> None:
            way.optimizer.zero_grad()
            dict(way.model.named_parameters())[chosen].requires_grad_(on)

        self.each(change)

    def go_on_with_a_copy(self) -> None:
        def change(way: Way) -> None:
            way.model = copy.deepcopy(way.model)
            way.optimizer = way.make_optimizer(way.model)

        self.each(change)
        self.saved = None

    def change_rates(self) -> None:
        factor = self.chance.uniform(0.5, 1.5)
        for way in self.ways:
            for group in way.optimizer.param_groups:
                group["lr"] *= factor

    def load_the_optimizer(self) -> None:
        """From its own state, or that of torch.optim for all."""
        own = self.chance.random() < 0.5
        states = [copy.deepcopy(way.optimizer.state_dict()) for way in self.ways]
        for way, state in zip(self.ways, states, strict=True):
            way.optimizer.load_state_dict(state if own else copy.deepcopy(states[0]))

    def change_options(self) -> None:
        options = {
            "reset_ratio": self.chance.choice([0.01, None]),
            "structure_gradient": self.chance.random() < 0.5,
        }
        name, value = self.chance.choice(sorted(options.items()))
        self.settle()
        index = self.chance.randrange(len(self.ways[0].model.layers))
        for way in self.ways:
            weight = getattr(way.model.layers[index], "weight", None)
            for layer in way.model.layers:  # all that share it
                if isinstance(layer, MaskedLayer) and layer.weight is weight:
                    setattr(layer, name, value)


EVENTS = [
    Trial.evaluation, Trial.forward_without_gradients, Trial.forward_without_backward,
    Trial.switch_mode, Trial.save_or_load_the_model, Trial.write, Trial.write, Trial.collapse,
    Trial.freeze_or_unfreeze, Trial.go_on_with_a_copy, Trial.change_rates,
    Trial.load_the_optimizer, Trial.change_options,
]  # fmt: skip


def _update_options(rule: str, chance: random.Random) -> dict:
    shared = {"weight_decay": chance.choice([0, 0.01]), "maximize": chance.random() < 0.1}
    if rule == "adamw":  # a smaller eps would enlarge the rounding errors of gradients near 0
        betas, eps = chance.choice([(0.9, 0.999), (0.5, 0.9)]), chance.choice([1e-4, 1e-2])
        return {"lr": 0.01, "betas": betas, "eps": eps, **shared}
    momentum = chance.choice([{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True},
                              {"momentum": 0.8, "dampening": 0.3}])  # fmt: skip
    return {"lr": 0.1, **momentum, **shared}


def _regularizer(model: nn.Module) -> Tensor:
    named = dict(model.named_parameters())
    return sum(
        torch.exp(-parameter).sum()
        for name, parameter in named.items()
        if "threshold" in name and named[name.replace("threshold", "weight")].requires_grad
    )


SEEDS = [
    seed if seed < FIRST_TIER else pytest.param(seed, marks=pytest.mark.slow) for seed in range(ALL)
]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_ways(seed):
    Trial(seed).run()
