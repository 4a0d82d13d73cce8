"""STR, worked out by hand: the soft threshold, its gradients, weight decay, what export leaves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.methods import STR
from tests.methods.small_layers import active, layers

QUARTER = -math.log(3)  # its sigmoid is 1/4


def soft(weight: list[float], **options) -> tuple[nn.Module, torch.optim.SGD, STR]:
    model, optimizer = layers((1, len(weight)), momentum=0)
    model[0].weight.data.copy_(torch.tensor([weight]))
    return model, optimizer, STR(model, optimizer, **options)


def test_soft_threshold_gradients_and_step():
    model, optimizer, method = soft([1.0, -1.0, 0.3, -0.2], start=QUARTER, weight_decay=0.5)
    assert active(method) == [0, 1, 2]
    torch.testing.assert_close(model[0].weight, torch.tensor([[0.75, -0.75, 0.05, 0]]))
    output = model(torch.tensor([[1.0, 2, 3, 4]]))
    assert output.item() == pytest.approx(0.75 - 1.5 + 0.15)
    output.sum().backward()
    computed_by = model[0].parametrizations.weight
    torch.testing.assert_close(computed_by.original.grad, torch.tensor([[1.0, 2, 3, 0]]))
    # - (1 - 2 + 3), times the derivative of the sigmoid, 1/4 * 3/4
    assert computed_by[0].s.grad.item() == pytest.approx(-2 * 3 / 16)
    optimizer.step()  # lr 0.1
    method.step()
    assert computed_by[0].s.item() == pytest.approx(QUARTER - 0.1 * (-3 / 8 + 0.5 * QUARTER))
    # w is [0.9, -1.2, 0, -0.2], the threshold sigmoid(-1.006) = 0.268
    assert active(method) == [0, 1]
    assert dst_kernels.remaining_ratio(model).item() == 0.5


def test_weight_decay_alone_drives_the_threshold():
    model, optimizer, method = soft([1.0, -1.0, 0.3, -0.2], start=-3200.0, weight_decay=2.0)
    s = model[0].parametrizations.weight[0].s
    for _ in range(10):
        (0 * model(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert s.item() == pytest.approx(-3200 * (1 - 0.1 * 2) ** 10)
    assert active(method) == [0, 1, 2, 3]


def test_export_leaves_plain_layers_and_copies_alone():
    model, _, _ = soft([1.0, -1.0, 0.3, -0.2], start=QUARTER)
    original = model[0].parametrizations.weight.original
    other = copy.deepcopy(model)
    dst_kernels.finalize_(model)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == ["0.weight"]
    assert model[0].weight is original, "an optimizer goes on with it"
    torch.testing.assert_close(model[0].weight, torch.tensor([[0.75, -0.75, 0.05, 0]]))
    torch.testing.assert_close(other[0].weight, model[0].weight)
    assert dst_kernels.remaining_ratio(other).item() == 0.75
    with pytest.raises(RuntimeError, match="a parametrized layer cannot be made dense"):
        dst_kernels.densify_(other)


def test_each_weight_counts_once_whoever_shares_it():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    model[1].weight = model[0].weight
    dst_kernels.sparsify_(model)
    STR(model, torch.optim.SGD(model.parameters(), lr=0.1), start=QUARTER)
    report, weights = dst_kernels.sparsity_report(model), [each.weight.detach() for each in model]
    kept = sum(int(weight.count_nonzero()) for weight in weights[1:])
    assert (report.kept, report.total, report.all_weights) == (kept, 27, 27)
    assert dst_kernels.remaining_ratio(model).item() == pytest.approx(kept / 27)
    dst_kernels.finalize_(model)
    assert model[0].weight is model[1].weight
    assert all(
        torch.equal(each.weight, weight) for each, weight in zip(model, weights, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "-start must be positive and finite, but is -0.0"),
        ({"start": "low"}, "start must be a negative number, but is 'low'"),
        ({"weight_decay": -1}, "weight_decay must be at least 0 and finite, but is -1"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises((TypeError, ValueError)) as caught:
        soft([1.0], **options)
    assert str(caught.value) == message


def test_without_weight_decay_nothing_would_be_pruned():
    model, _ = layers((1, 4))
    with pytest.raises(ValueError, match=r"optimizer \(Rprop\) has no weight decay"):
        STR(model, torch.optim.Rprop(model.parameters()))
