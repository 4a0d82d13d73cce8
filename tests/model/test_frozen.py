"""A frozen weight keeps its mask: nothing moves its threshold, whoever trains the rest."""

import copy

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.nn.find import named_masked_weights
from dst_kernels.optim import DSTSGD, DSTAdamW


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 5, 2)
        self.attention, self.lstm = nn.MultiheadAttention(5, 1), nn.LSTM(5, 6, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.up(self.conv(x)).transpose(1, 2)
        return self.head(self.normed(self.lstm(self.attention(x, x, x)[0])[0]))


def _model(granularity="row", frozen_before=False):
    torch.manual_seed(0)
    model = _Net()
    if frozen_before:
        model.requires_grad_(False)
    config = dst_kernels.SparsifyConfig(granularity=granularity)
    model = dst_kernels.sparsify_(model, config)
    with torch.no_grad():
        for _, part in named_masked_weights(model):
            part.threshold.fill_(0.15)
    return model


def _train(model, way):
    if way in (DSTSGD, DSTAdamW):
        optimizer, alpha = way(model, lr=0.1, alpha=0.3), None
    else:
        if way == "grouped":
            dst_kernels.group_(model)
        optimizer, alpha = torch.optim.SGD(dst_kernels.parameter_groups(model), lr=0.1), 0.3
    x = torch.randn(2, 3, 5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        if alpha is not None:
            loss = loss + alpha * dst_kernels.sparse_regularization(model)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("granularity", ["row", "layer", "element"])
@pytest.mark.parametrize("way", ["layer by layer", "grouped", DSTSGD, DSTAdamW])
def test_nothing_moves_the_threshold_of_a_frozen_weight(way, granularity):
    model = _model(granularity)
    frozen = [part for name, part in named_masked_weights(model) if name != "head"]
    for part in frozen:  # the weights alone: thresholds still ask for gradients
        if part.name in part.module._parameters:
            part.weight.requires_grad_(False)
    model.normed.parametrizations.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert len(frozen) == 7
    _train(model, way)
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {name for name in moved if "threshold" in name} == {"head.threshold"}
    model.requires_grad_(True)  # trained again, the masks move again
    _train(model, "layer by layer")
    after = model.state_dict()
    assert all((after[k] != before[k]).any() for k in after if "threshold" in k)


def test_thresholds_of_weights_frozen_before_are_frozen_with_them():
    model = _model(frozen_before=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.head.requires_grad_(True)
    groups = dst_kernels.parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [2, 1]
    _train(model, DSTSGD)
    assert (model.head.threshold != 0.15).any() and (model.conv.threshold == 0.15).all()


class BaseTunerLayer:
    __module__ = "peft.tuners.tuners_utils"  # as peft has it, which need not be installed


class _LoRA(nn.Module, BaseTunerLayer):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_left_alone():
    model = nn.Sequential(_LoRA(nn.Linear(4, 3)), nn.Linear(3, 2))
    plan = dst_kernels.plan_sparsify(model)
    assert [layer.action for layer in plan.layers] == ["convert", "skip", "skip", "convert"]
    assert all("adapter" in layer.reason for layer in plan.layers if layer.action == "skip")
    dst_kernels.sparsify_(model)
    assert type(model[0].lora_A["default"]) is nn.Linear
    assert not model[0].base_layer.threshold.requires_grad and model[1].threshold.requires_grad
