"""Whole models with recurrent modules: conversion, reports, groups of parameters, optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.nn import MaskedGRU, MaskedLinear, MaskedLSTM, MaskedRNN
from tests.nn.recurrent_cases import expected_masks
from tests.ops import authors

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Reader(nn.Module):
    """Two recurrent modules, a linear layer between them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.between = nn.Linear(16, 5)
        self.gru = nn.GRU(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.between(self.lstm(input)[0]))
        return self.head(self.gru(hidden)[0][:, -1])


def reader(**options) -> Reader:
    torch.manual_seed(1)
    return dst_kernels.sparsify_(Reader().double(), dst_kernels.SparsifyConfig(**options))


def pruning(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "threshold" in name:
            nn.init.uniform_(parameter, 0.02, 0.15)
    return model


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    input = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    return input, torch.randn(4, 3, generator=generator, dtype=torch.float64)


def test_conversion_shares_parameters_and_changes_no_output():
    torch.manual_seed(1)
    dense = Reader().double()
    plan = dst_kernels.plan_sparsify(dense)
    assert plan.named("convert") == ["lstm", "between", "gru", "head"]
    wanted, weight = dense(data(0)[0]), dense.lstm.weight_hh_l1_reverse
    model = dst_kernels.sparsify_(dense)
    assert type(model.lstm) is MaskedLSTM and type(model.gru) is MaskedGRU
    assert model.lstm.weight_hh_l1_reverse is weight
    torch.testing.assert_close(model(data(0)[0]), wanted, rtol=0, atol=0)
    assert dst_kernels.plan_sparsify(model).named("masked") == ["lstm", "between", "gru", "head"]
    assert isinstance(dst_kernels.sparsify_(nn.RNN(2, 3)), MaskedRNN)


def test_what_stays_dense_and_why():
    class Weird(nn.LSTM):
        def forward(self, input, hx=None):
            return torch.lstm(
                input, hx, self._flat_weights, True, 1, 0.0, self.training, False, False
            )

    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.GRU(2, 3)
            self.called = nn.GRU(2, 3)

        def forward(self, input):
            return torch.gru(
                input, torch.zeros(1, input.shape[1], 3), self.read._flat_weights,
                True, 1, 0.0, False, False, False,
            )[0] + self.called(input)[0]  # fmt: skip

    model = nn.ModuleDict(
        {
            "weird": Weird(2, 3),
            "peeking": Peeking(),
            "normed": nn.utils.parametrizations.weight_norm(nn.LSTM(2, 3), "weight_hh_l0"),
            "cell": nn.GRUCell(2, 3),
            "small": nn.LSTM(2, 3),
        }
    )
    reasons = {
        layer.name: layer.reason
        for layer in dst_kernels.plan_sparsify(
            model, dst_kernels.SparsifyConfig(min_numel=61)
        ).layers
        if layer.action == "skip"
    }
    assert "forward of its own" in reasons["weird"]
    assert "parametrized" in reasons["normed"]
    assert reasons["cell"].startswith("min_numel: 45")
    assert reasons["small"] == "min_numel: 60 < 61 weights"
    assert reasons["peeking.called"].startswith("min_numel: 45")
    zero = nn.LSTM(2, 3)
    nn.init.zeros_(zero.weight_hh_l0)
    assert "all its weights are 0" in dst_kernels.plan_sparsify(zero).layers[0].reason
    fused = dst_kernels.plan_sparsify(nn.LSTM(2, 3), dst_kernels.SparsifyConfig(path="fused"))
    assert "no path 'fused'" in fused.layers[0].reason


def test_the_report_names_every_weight():
    model = pruning(reader())
    with torch.no_grad():
        model.gru.threshold_hh_l0[7:14].fill_(9.0)  # its second gate collapses
    report = dst_kernels.sparsity_report(model)
    names = [layer.name for layer in report.layers]
    assert names[:2] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert names[-4:] == ["between", "gru.weight_ih_l0", "gru.weight_hh_l0", "head"]
    by_name = {layer.name: layer for layer in report.layers}
    for module in ("lstm", "gru"):
        for name, mask in expected_masks(getattr(model, module)).items():
            found = by_name[f"{module}.{name}"]
            assert (found.kept, found.total) == (mask.sum().item(), mask.numel())
            assert found.dead_rows == (~mask.any(1)).sum().item()
            assert found.dead_columns == (~mask.any(0)).sum().item()
    assert by_name["gru.weight_hh_l0"].threshold_max < 1  # effective ones
    assert dst_kernels.remaining_ratio(model).item() == pytest.approx(report.remaining_ratio)
    single = dst_kernels.sparsity_report(MaskedRNN(2, 3))
    assert [layer.name for layer in single.layers] == ["weight_ih_l0", "weight_hh_l0"]


def test_layer_granularity_in_the_report():
    model = reader(granularity="layer")
    nn.init.uniform_(model.gru.threshold_ih_l0, 0.05, 0.3)
    found = {layer.name: layer for layer in dst_kernels.sparsity_report(model).layers}
    mask = expected_masks(model.gru)["weight_ih_l0"]
    assert 0 < found["gru.weight_ih_l0"].kept == mask.sum().item() < mask.numel()


def test_regulariser_and_parameter_groups_have_every_threshold():
    model = pruning(reader())
    thresholds = {n: p for n, p in model.named_parameters() if "threshold" in n}
    assert len(thresholds) == 8 + 1 + 2 + 1
    wanted = authors.regularizer(thresholds.values())
    torch.testing.assert_close(dst_kernels.sparse_regularization(model), wanted, **CLOSE)
    weights, others = dst_kernels.parameter_groups(model)
    assert {id(p) for p in others["params"]} == {id(p) for p in thresholds.values()}
    assert len(weights["params"]) == len(list(model.parameters())) - len(thresholds)


def test_finalize():
    model = pruning(reader()).eval()
    wanted = model(data(0)[0])
    masks = expected_masks(model.lstm)
    dense = dst_kernels.finalize_(model)
    assert type(dense.lstm) is nn.LSTM and type(dense.gru) is nn.GRU
    torch.testing.assert_close(dense(data(0)[0]), wanted, rtol=0, atol=0)
    assert torch.equal(dense.lstm.weight_ih_l0 != 0, masks["weight_ih_l0"])
    fresh = Reader().double()
    fresh.load_state_dict(dense.state_dict())
    torch.testing.assert_close(fresh(data(0)[0]), wanted, rtol=0, atol=0)


def test_weights_that_modules_share_share_their_threshold():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    dst_kernels.sparsify_(model)
    assert model[1].threshold_hh_l0 is model[0].threshold_hh_l0
    assert model[1].threshold_ih_l0 is not model[0].threshold_ih_l0
    assert dst_kernels.sparsity_report(model).total == 3 * 64
    dense = dst_kernels.finalize_(model)
    assert dense[1].weight_hh_l0 is dense[0].weight_hh_l0
    input = torch.randn(3, 2, 4)
    torch.testing.assert_close(
        dense[1](input)[0],
        torch.lstm(
            input, [torch.zeros(1, 2, 4)] * 2, list(dense[1].parameters()),
            True, 1, 0.0, False, False, False,
        )[0],
    )  # fmt: skip


# -- training ----------------------------------------------------------------------------------

ALPHA, STEPS, RESET_AT = 0.02, 40, 15


def train(model: nn.Module, optimizer, penalty: bool) -> list[float]:
    losses = []
    for step in range(STEPS):
        if step == RESET_AT:
            with torch.no_grad():
                model.gru.threshold_hh_l0[:7].fill_(5.0)
        input, target = data(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(input), target)
        losses.append(loss.item())
        if penalty:
            loss = loss + ALPHA * dst_kernels.sparse_regularization(model)
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_grouped_and_deferred_training_is_that_of_torch_optim(granularity):
    """Recurrent modules keep exact gradients; the deferred step takes them as plain parameters."""
    start = reader(granularity=granularity)
    plain, grouped, deferred = (copy.deepcopy(start) for _ in range(3))
    dst_kernels.group_(grouped)
    losses = [
        train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), penalty=True)
        for model in (plain, grouped)
    ]
    optimizer = dst_kernels.optim.DSTSGD(deferred, lr=0.1, momentum=0.9, alpha=ALPHA)
    losses.append(train(deferred, optimizer, penalty=False))
    assert len(set(losses[0])) == STEPS
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-9)
    wanted = dict(plain.named_parameters())
    for model in (grouped, deferred):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, wanted[name], **CLOSE, msg=name)
    assert 0 < wanted["gru.threshold_hh_l0"][:7].max() < 5  # it was reset, and went on


def test_deferred_optimizer_of_a_model_with_nothing_but_recurrent_modules():
    torch.manual_seed(0)
    start = pruning(dst_kernels.sparsify_(nn.GRU(3, 4).double()))
    plain, deferred = copy.deepcopy(start), copy.deepcopy(start)
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    sgd = torch.optim.AdamW(dst_kernels.parameter_groups(plain), lr=0.01, weight_decay=0.0)
    ours = dst_kernels.optim.DSTAdamW(deferred, lr=0.01, weight_decay=0.0, alpha=ALPHA)
    for _ in range(5):
        for model, optimizer in ((plain, sgd), (deferred, ours)):
            optimizer.zero_grad()
            loss = model(input)[0].square().mean()
            if model is plain:
                loss = loss + ALPHA * dst_kernels.sparse_regularization(model)
            loss.backward()
            optimizer.step()
    for (name, one), other in zip(plain.named_parameters(), deferred.parameters(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE, msg=name)
    assert isinstance(deferred, MaskedGRU)


def test_a_mixed_model_keeps_its_linear_layers_deferred():
    model = reader()
    optimizer = dst_kernels.optim.DSTSGD(model, lr=0.1, alpha=ALPHA)
    input, target = data(0)
    F.mse_loss(model(input), target).backward()
    assert isinstance(model.between, MaskedLinear)
    assert model.between.threshold.grad is None  # its gradient is made in the step
    assert model.gru.threshold_hh_l0.grad is not None
    optimizer.step()


def test_weights_unchanged_changes_no_result():
    model = pruning(reader()).eval()
    wanted = model(data(0)[0])
    with dst_kernels.weights_unchanged(model):
        torch.testing.assert_close(model(data(0)[0]), wanted, rtol=0, atol=0)
