"""TargetRatio: the ramp, one look worked out by hand, the end, every optimizer, no host read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dst_kernels
from dst_kernels import TargetRatio
from dst_kernels.nn import MaskedLinear
from dst_kernels.nn.find import named_masked_weights
from dst_kernels.optim import DSTSGD, DSTAdamW


def small(granularity="row", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 10))
    with torch.no_grad():
        model[0].weight.mul_(5)  # layers of different scales
    return dst_kernels.sparsify_(model, dst_kernels.SparsifyConfig(granularity=granularity))


def test_the_ramp_is_what_it_says():
    model = small()
    cubic = TargetRatio(model, 0.2, 10)
    assert [cubic.wanted(step) for step in (0, 5, 10, 99)] == [1.0, 0.2 + 0.8 / 8, 0.2, 0.2]
    linear = TargetRatio(model, 0.2, 10, schedule="linear")
    assert [linear.wanted(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])


def test_one_look_is_as_worked_out_by_hand():
    model = nn.Sequential(MaskedLinear(10, 1, reset_ratio=None))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11))
    controller = TargetRatio(model, 0.5, 100, schedule="linear")
    with torch.no_grad():
        model[0].threshold.fill_(1.5)  # 9 of 10 are left
    controller.step()
    # log(ratio) fell from 0 to log(0.9), of which a look believes 0.3; eleven steps on the ramp
    # wants 1 - 0.5 * 0.11. The quotient of the paces, to the power of 0.3, multiplies alpha.
    pace, needed = -0.3 * math.log(0.9), (math.log(0.9) - math.log(0.945)) / 10
    assert needed < 0, "it is below the ramp already: as if no pace were needed"
    expected = 1e-7 * max(0.5, max(0.1, 1e-6 / (pace + 1e-6)) ** 0.3)
    assert controller.alpha.item() == pytest.approx(expected, rel=1e-5)
    controller.step()
    pace, needed = 0.7 * pace, (math.log(0.9) - math.log(0.94)) / 10
    expected *= max(0.5, max(0.1, 1e-6 / (pace + 1e-6)) ** 0.3)
    assert controller.alpha.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model[0].threshold.zero_()  # all are back: alpha has to rise as fast as it may
    before = controller.alpha.item()
    controller.step()
    assert controller.alpha.item() == pytest.approx(1.5 * before, rel=1e-5)


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
def test_the_end_is_exact_and_keeps_what_training_found(granularity):
    model = small(granularity)
    parts = dict(named_masked_weights(model))
    with torch.no_grad():
        for part in parts.values():
            part.threshold.uniform_(0, 0.3).mul_(part.weight.std())
    order = {name: part.threshold.clone() for name, part in parts.items()}
    TargetRatio(model, 0.3, 1, freeze=False).step()
    report = dst_kernels.sparsity_report(model)
    assert report.kept == round(0.3 * report.total)
    for name, part in parts.items():
        moved = (part.threshold - order[name]) / part.weight.std(correction=0)
        torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=1e-4, atol=1e-6)
    for part in parts.values():
        order = part.threshold.clone()
        TargetRatio(model, 0.3, 1, freeze=False).step()
        torch.testing.assert_close(part.threshold, order, rtol=1e-5, atol=1e-6)


def test_no_matrix_ends_empty_or_restarted():
    """One layer is far below the others, and would end empty: the guard would then keep it all."""
    model = dst_kernels.sparsify_(
        nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30), nn.GRU(30, 20))
    )
    with torch.no_grad():
        model[1].threshold.fill_(0.9 * model[1].weight.abs().max())
        model[2].threshold_hh_l0[20:40] = 0.95 * model[2].weight_hh_l0[20:40].abs().max()
    TargetRatio(model, 0.1, 1, freeze=False).step()
    report = dst_kernels.sparsity_report(model)
    assert report.kept == round(0.1 * report.total)
    gates = dict(named_masked_weights(model))["2.weight_hh_l0"].mask().chunk(3)
    shares = [layer.remaining_ratio for layer in report.layers]
    shares += [gate.float().mean().item() for gate in gates]
    assert all(0.01 < share < 0.5 for share in shares), shares


@pytest.mark.parametrize("matrices", [1, 4])
def test_a_matrix_close_to_the_guard_is_held_and_no_other(matrices):
    """Below 1.6 of 100 weights is too few: thresholds then fall by a tenth at each look."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(10, 10 * matrices, bias=False), nn.Linear(10, 10)])
    dst_kernels.mask_parameter_(model[0], "weight", matrices=matrices, reset_ratio=0.008)
    dst_kernels.mask_parameter_(model[1], "weight", reset_ratio=None)
    controller = TargetRatio(model, 0.1, 1000)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.arange(1.0, 101).repeat(len(layer.weight) // 10).view(-1, 10))
            layer.threshold.fill_(99.0)  # one weight of each matrix is left
        model[0].threshold[:10] = 98.0 if matrices > 1 else 99.0  # two of the first of several
    before = [layer.threshold.clone() for layer in model]
    for _ in range(controller._every):
        controller.step()
    expected = 0.9 * before[0]
    if matrices > 1:
        expected[:10] = 98.0
    torch.testing.assert_close(model[0].threshold, expected)
    torch.testing.assert_close(model[1].threshold, before[1], rtol=0, atol=0)


def test_the_guard_does_not_restart_what_ends_sparse():
    model = small()
    TargetRatio(model, 0.02, 10)
    assert [model[i].reset_ratio for i in (0, 2)] == [0.002] * 2
    TargetRatio(model, 0.5, 10)
    assert [model[i].reset_ratio for i in (0, 2)] == [0.002] * 2, "never raised"


STEPS = 800
OPTIMIZERS = {
    "DSTSGD": lambda model, alpha: DSTSGD(model, lr=0.05, momentum=0.9, alpha=alpha),
    "DSTAdamW": lambda model, alpha: DSTAdamW(model, lr=1e-2, weight_decay=0, alpha=alpha),
    "SGD": lambda model, alpha: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
}


def make(name, freeze=True):
    model = small()
    controller = TargetRatio(model, 0.1, STEPS, freeze=freeze)
    optimizer = OPTIMIZERS[name](model, controller)
    if name == "SGD":
        controller.follow(optimizer)
    return model, controller, optimizer


def train(model, controller, optimizer, steps):
    generator = torch.Generator().manual_seed(steps.start)
    teacher = torch.randn(20, 10, generator=torch.Generator().manual_seed(99))
    for _ in steps:
        inputs = torch.randn(32, 20, generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ teacher).argmax(1))
        if not isinstance(optimizer, (DSTSGD, DSTAdamW)):
            loss = loss + controller.alpha * dst_kernels.sparse_regularization(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gets_there_and_a_stop_on_the_way_changes_nothing(name):
    model, controller, optimizer = run = make(name)
    train(*run, range(STEPS // 2))
    assert dst_kernels.remaining_ratio(model).item() == pytest.approx(
        controller.wanted(STEPS // 2), rel=0.3
    )
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed, second = again = make(name)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert resumed.steps_done == STEPS // 2 and torch.equal(resumed.alpha, controller.alpha)
    for each in (run, again):
        train(*each, range(STEPS // 2, STEPS))
    assert controller.settled and controller.alpha == 0
    train(*run, range(STEPS, STEPS + 20))
    train(*again, range(STEPS, STEPS + 20))
    report = dst_kernels.sparsity_report(model)
    assert report.kept == round(0.1 * report.total)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("seed", range(20))
def test_the_end_keeps_exactly_what_is_asked_for(seed):
    """No weight lies so close to its threshold that rounding decides."""
    model = small(seed=seed)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.threshold.uniform_(0, 0.1)
    TargetRatio(model, 0.3, 1).step()
    assert dst_kernels.sparsity_report(model).kept == round(0.3 * 1800)


def test_parts_of_a_model_have_targets_of_their_own():
    def made():
        model = small()
        controllers = [TargetRatio(model[0], 0.1, STEPS), TargetRatio(model[2], 0.6, STEPS)]
        groups = [
            {"params": model[i].parameters(), "alpha": controller}
            for i, controller in zip((0, 2), controllers, strict=True)
        ]
        return model, controllers, DSTSGD(model, groups, lr=0.05, momentum=0.9)

    model, controllers, optimizer = made()
    train(model, None, optimizer, range(STEPS // 2))
    other, resumed, second = made()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert [each.alpha for each in resumed] == [each.alpha for each in controllers]
    assert resumed[0].alpha != resumed[1].alpha
    for each, by in ((model, optimizer), (other, second)):
        train(each, None, by, range(STEPS // 2, STEPS))
        kept = [layer.kept for layer in dst_kernels.sparsity_report(each).layers]
        assert kept == [round(0.1 * 1200), round(0.6 * 600)]
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_without_freezing_the_ratio_is_held():
    model, controller, optimizer = make("DSTSGD", freeze=False)
    train(model, controller, optimizer, range(2 * STEPS))
    assert dst_kernels.remaining_ratio(model).item() == pytest.approx(0.1, rel=0.25)
    assert not any(part.fixed_mask is not None for _, part in named_masked_weights(model))


def test_nothing_is_read_by_the_host():
    """A fake tensor has no value to read: whoever tries raises an error."""
    with FakeTensorMode():
        model = small()
        controller = TargetRatio(model, 0.1, 5)
        for _ in range(7):
            controller.step()
    assert controller.settled


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": 0}, ValueError, "target must be positive"),
        ({"target": 1.0}, ValueError, "target must be below 1, but is 1.0"),
        ({"target": "5 %"}, TypeError, "target must be a number"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of cubic, linear"),
        ({"freeze": 1}, TypeError, "freeze must be True or False"),
        ({"model": nn.Linear(2, 2)}, ValueError, "no masked"),
        ({"model": dst_kernels.freeze_masks_(small())}, ValueError, "masks are fixed"),
    ],
)
def test_bad_input_is_named(options, error, words):
    given = {"model": small(), "target": 0.1, "steps": 10, **options}
    with pytest.raises(error, match=words):
        TargetRatio(given.pop("model"), **given)
