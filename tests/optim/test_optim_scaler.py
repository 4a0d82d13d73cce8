"""With GradScaler, which hands its scale and its finding of infinities over to the step."""

from __future__ import annotations

import pytest
import torch
from networks import channels_last, linear, other_granularities, with_dense_layers
from twins import Twins, batches, masked_layers

STEPS = 12
INFINITE = float("inf")


class Scaled:
    """Twins of which only ours has a scaler."""

    def __init__(self, network, backend, rule="sgd", convert=None, **options):
        model, shape = network(backend=backend)
        model = model if convert is None else convert(model)
        self.twins = Twins(model, rule, backend=backend, **{"lr": 0.1, **options})
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
        self.data = batches(shape)

    @property
    def model(self):
        return self.twins.ours.model

    @property
    def optimizer(self):
        return self.twins.ours.optimizer

    def backward(self, i, sides=2):
        input, target = self.data[i % 4]
        for side in self.twins.sides[:sides]:
            side.optimizer.zero_grad()
            loss = side.loss(input, target) + side.regularizer(self.twins.alphas)
            (self.scaler.scale(loss) if side is self.twins.ours else loss).backward()

    def step(self, sides=2):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if sides == 2:
            self.twins.theirs.optimizer.step()

    def train(self, steps=STEPS):
        for i in range(steps):
            self.backward(i)
            self.step()

    def everything(self):
        """A copy of all that a step may touch."""
        state = self.optimizer.state_dict()["state"]
        packs = {key: made.weight.tensor for key, made in self.optimizer._deferral._made.items()}
        tensors = [*self.model.state_dict().values(), *packs.values()]
        tensors += [value for each in state.values() for value in each.values()]
        return [tensor.detach().clone() for tensor in tensors]


RULES = {"sgd": {"momentum": 0.9, "dampening": 0.3}, "adamw": {"lr": 0.02}}


@pytest.mark.parametrize("alpha_in_loss", [False, True])
@pytest.mark.parametrize("network", [linear, with_dense_layers, channels_last, other_granularities])
@pytest.mark.parametrize("rule", RULES)
def test_as_without_scaler(rule, network, alpha_in_loss, backend):
    """Powers of two round nothing."""
    case = Scaled(network, backend, rule, alpha=0.05, alpha_in_loss=alpha_in_loss, **RULES[rule])
    case.train()
    assert case.scaler.get_scale() > 2.0**12, "it grew"
    case.twins.assert_same(case.data[0][0])


WHERE = {
    "bias": lambda model: model[0].bias,
    "weight": lambda model: model[0].weight,
    "last weight": lambda model: model[-1].weight,
    "threshold": lambda model: model[-1].threshold,
}


@pytest.mark.parametrize("value", [INFINITE, float("nan")])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rule", RULES)
def test_an_infinite_gradient_skips_the_step(rule, where, value, backend):
    """Nothing changes but the scale."""
    case = Scaled(linear, backend, rule, alpha=0.05, alpha_in_loss=True, **RULES[rule])
    case.train(4)
    case.backward(0)
    case.model.eval()(case.data[0][0])  # what is packed then is what it was
    case.model.train()
    before, scale = case.everything(), case.scaler.get_scale()
    WHERE[where](case.model).grad.view(-1)[-1] = value
    case.step(sides=1)
    assert case.scaler.get_scale() == scale / 2
    after = case.everything()
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    case.train(4)
    case.twins.assert_same(case.data[0][0])


@pytest.mark.parametrize("rule", RULES)
def test_a_first_step_that_is_skipped(rule, backend):
    """As is usual while the scale is still sought: the next step is the first."""
    case = Scaled(linear, backend, rule, alpha=0.05, weight_decay=0.01, **RULES[rule])
    before = [p.detach().clone() for p in case.model.parameters()]
    for i in range(2):
        case.backward(i, sides=1)
        case.model[2].weight.grad[0, 0] = INFINITE
        case.step(sides=1)
    assert all(map(torch.equal, before, case.model.parameters()))
    case.train()
    case.twins.assert_same(case.data[0][0])


def test_a_skipped_step_spares_the_guard(backend):
    """Nor does it reset a layer that its own thresholds would empty."""
    case = Scaled(linear, backend, lr=1.0)
    case.backward(0)
    with torch.no_grad():
        case.model[0].weight.grad.fill_(INFINITE)
    case.step(sides=1)
    assert all(not layer.threshold.any() for layer in masked_layers(case.model))


@pytest.mark.parametrize("rule", RULES)
def test_unscaling_by_hand_and_clipping(rule, backend):
    """In float32 as far as the norm goes."""
    case = Scaled(linear, backend, rule, alpha=0.05, **RULES[rule])
    case.twins.tolerance = 2e-5
    for i in range(STEPS):
        case.backward(i)
        case.scaler.unscale_(case.optimizer)
        norm = case.optimizer.clip_grad_norm_(0.1)
        exact = torch.nn.utils.clip_grad_norm_(case.twins.theirs.model.parameters(), 0.1)
        torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0)
        assert exact > 0.1
        case.step()
    case.twins.assert_same(case.data[0][0])


def test_unscaling_by_hand_finds_infinities(backend):
    case = Scaled(linear, backend, momentum=0.9)
    case.train(2)
    case.backward(0)
    case.model[0].weight.grad[0, 0] = INFINITE
    before = case.everything()
    case.scaler.unscale_(case.optimizer)
    case.optimizer.clip_grad_norm_(0.1)
    case.step(sides=1)
    assert all(map(torch.equal, before, case.everything()))
    case.train(3)  # the coefficient of then is forgotten
    case.twins.assert_same(case.data[0][0])


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, by_hand, backend):
    """Whatever dtype G has, the scaler takes it, and an overflow of the product is found."""
    case = Scaled(linear, backend, convert=lambda model: model.float(), momentum=0.9)
    input, target = (case.data[0][0].float(), case.data[0][1])
    before = None
    for i in range(4):
        overflows = i == 2
        case.optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = case.twins.ours.loss(input, target)
        case.scaler.scale(loss).backward()
        if overflows:
            case.model[0].weight.grad[0, 0] = INFINITE
            before = case.everything()
        if by_hand:
            case.scaler.unscale_(case.optimizer)
        case.scaler.step(case.optimizer)
        case.scaler.update()
        if overflows:
            assert all(map(torch.equal, before, case.everything()))
    assert case.scaler.get_scale() == 2.0**11
    assert all(p.isfinite().all() for p in case.model.parameters())
