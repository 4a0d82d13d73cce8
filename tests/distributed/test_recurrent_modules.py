"""Recurrent modules and attention under DDP and FSDP2 over two processes, beside one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from workers import assert_same_state, full_state, local_part, run_workers

import dst_kernels
from dst_kernels.nn import MaskedGRU, MaskedLSTM

GRANULARITIES = ("row", "layer", "element")
STEPS, RESET_AT = 12, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # in float64: only the order of additions differs


class Reader(nn.Module):
    """Rows that two processes cannot share out evenly, nor gates."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, bidirectional=True, proj_size=3)
        self.attention = nn.MultiheadAttention(6, 2)
        self.gru = nn.GRU(6, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.lstm(input)[0]
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(self.gru(hidden)[0][-1])


def build(granularity: str) -> nn.Module:
    torch.manual_seed(0)
    config = dst_kernels.SparsifyConfig(granularity=granularity)
    return dst_kernels.sparsify_(Reader().double(), config)


@torch.no_grad()
def collapse(model: nn.Module) -> None:
    """All gates but the last of one weight of each module; sharded or not."""
    for module in model.modules():
        if isinstance(module, (MaskedLSTM, MaskedGRU, nn.MultiheadAttention)):
            attention = isinstance(module, nn.MultiheadAttention)
            threshold = module.threshold_in_proj_weight if attention else module.threshold_hh_l0
            raised = torch.full(threshold.shape, 5.0, dtype=torch.float64)
            raised.chunk(4 if isinstance(module, MaskedLSTM) else 3)[-1].fill_(0.01)
            if isinstance(threshold, torch.distributed.tensor.DTensor):
                raised = torch.distributed.tensor.distribute_tensor(
                    raised, threshold.device_mesh, threshold.placements
                )
            threshold.copy_(raised)


def train(model: nn.Module, called: nn.Module, part) -> None:
    optimizer = torch.optim.SGD(
        dst_kernels.parameter_groups(model, threshold_lr=0.05), lr=0.05, momentum=0.9
    )
    for step in range(STEPS):
        if step == RESET_AT:
            collapse(model)
        generator = torch.Generator().manual_seed(step)
        input = torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)
        target = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        loss = (called(part(input, 1)) - part(target, 0)).square().mean()
        (loss + 0.02 * dst_kernels.sparse_regularization(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int) -> dict:
    def part(tensor: Tensor, dim: int) -> Tensor:
        return local_part(tensor.transpose(0, dim), rank).transpose(0, dim)

    found = {}
    for granularity in GRANULARITIES:
        model = build(granularity)
        train(model, DistributedDataParallel(model), part)
        found["ddp", granularity] = model.state_dict()
        for wrapping in ("layers", "root"):
            model = build(granularity)
            if wrapping == "layers":
                fully_shard(model.lstm)
                fully_shard(model.gru)
            fully_shard(model)
            train(model, model, part)
            report = dst_kernels.sparsity_report(model).to_dict()
            found[wrapping, granularity] = full_state(model)
            found[wrapping, granularity, "report"] = report
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both processes, which run everything since starting them takes longest."""
    return run_workers(worker, tmp_path_factory.mktemp("recurrent"))


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_same_trajectory_as_one_process(runs, granularity):
    model = build(granularity)
    train(model, model, lambda tensor, dim: tensor)
    expected, report = model.state_dict(), dst_kernels.sparsity_report(model).to_dict()
    thresholds = [value for name, value in expected.items() if "threshold" in name]
    assert max(t.max() for t in thresholds) < 1, "the reset happened"
    for run in runs:
        assert_same_state(run["ddp", granularity], expected, **CLOSE)
    for wrapping in ("layers", "root"):
        assert_same_state(runs[0][wrapping, granularity], expected, **CLOSE)
        assert runs[1][wrapping, granularity, "report"]["kept"] == report["kept"]
