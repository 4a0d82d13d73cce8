"""`check_masks`: what it finds, and that it leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import masked_weights

import dst_kernels
from dst_kernels import check_masks, optim


class Faulty(nn.Module):
    """Uses its layers in ways that masks cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.untrained, self.unused, self.past, self.hidden = (
            nn.Linear(6, 6) for _ in range(5)
        )
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x):
        past = F.linear(x, self.past._parameters["weight"])
        out = self.drop(self.norm(self.untrained(self.fine(x))))
        return {"out": [out + past + 0 * self.hidden(x)], "count": torch.ones(1).long()}


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


X = torch.linspace(-1, 1, 24).view(4, 6)


def test_what_is_found():
    model = dst_kernels.sparsify_(Faulty())
    found = check_masks(model, X)
    assert found.keys() == {"unused", "past", "hidden"}
    assert "not used" in found["unused"] and "past its mask" in found["past"]
    assert "changes no output" in found["hidden"]
    before = torch.optim.SGD(model.fine.parameters(), lr=0.1)
    found = check_masks(model, x=X, optimizers=[before])
    assert found.keys() == {"unused", "past", "hidden", "untrained"}
    assert "no given optimizer" in found["untrained"]


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_it_was(training):
    model = dst_kernels.sparsify_(Faulty()).train(training)
    for part in masked_weights(model).values():
        nn.init.uniform_(part.threshold, 0, 0.1)
    model(X)["out"][0].sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    check_masks(model, X)
    assert torch.equal(torch.get_rng_state(), random) and model.training == training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, parameter in model.named_parameters():
        expected = grads[name]
        assert (parameter.grad is None) == (expected is None), name
        assert expected is None or torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize("way", ["grouped", "deferred"])
def test_whole_models(way):
    def train(check):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        model = dst_kernels.sparsify_(nn.Sequential(layer, nn.Linear(6, 2)))
        if way == "deferred":
            optimizer = optim.DSTSGD(model, lr=0.1, momentum=0.9)
        else:
            groups = dst_kernels.parameter_groups(dst_kernels.group_(model))
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            model(X[None]).square().sum().backward()
            if check:
                assert check_masks(model, X[None], optimizers=[optimizer]) == {}
            optimizer.step()
        return model.state_dict()

    torch.testing.assert_close(train(check=True), train(check=False))


def test_bad_input():
    with pytest.raises(ValueError, match="no masked layers"):
        check_masks(nn.Linear(2, 2), torch.ones(1, 2))
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(2, 2), Detached()))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        check_masks(model, torch.ones(1, 2))
    assert not model[0].threshold.any(), "and everything is as it was"
