"""FSDP2's `fully_shard` over two gloo processes takes the steps that one process takes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.tensor import DTensor
from workers import (
    assert_same_state,
    batch,
    build,
    full_state,
    local_part,
    masked_layers,
    run_workers,
    shard,
    single_process,
    train,
)

import dst_kernels

GRANULARITIES = ("row", "layer", "element")
# (granularity, what is wrapped, reshard after forward, every process sees the whole batch)
TRAJECTORIES = [
    *itertools.product(GRANULARITIES, ("layers", "root"), (True,), (True, False)),
    ("row", "layers", False, True),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # in float64: only the order of additions differs


def everything(model):
    """What the tests compare, all of it from collective calls."""
    return {
        "report": dst_kernels.sparsity_report(model).to_dict(),
        "ratio": dst_kernels.remaining_ratio(model),
        "regularization": dst_kernels.sparse_regularization(model).detach(),
        "layer_ratios": [layer.remaining_ratio() for layer in masked_layers(model)],
        "masks": [layer.mask() for layer in masked_layers(model)],
        "state": full_state(model),
    }


def trained(rank, granularity, wrapping, *, same_data, reshard):
    model = shard(build(granularity), wrapping, reshard_after_forward=reshard)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    def data(step):
        images, targets = batch(step)
        return (
            (images, targets)
            if same_data
            else (local_part(images, rank), local_part(targets, rank))
        )

    losses = train(model, model, data)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()) or not reshard
    return {"losses": losses, **everything(model)}


def all_trajectories(rank):
    return {run: trained(rank, *run[:2], reshard=run[2], same_data=run[3]) for run in TRAJECTORIES}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    return run_workers(all_trajectories, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("run", TRAJECTORIES, ids=str)
def test_same_trajectory_and_state_as_one_process(trajectories, run):
    """Bit for bit where every process sees the whole batch: the average is exact then."""
    granularity, *_, same_data = run
    expected = single_process(granularity)
    first, second = (result[run] for result in trajectories)
    tolerance = {"rtol": 0, "atol": 0} if same_data else CLOSE
    assert_same_state(first["state"], expected["state"], **tolerance)
    assert second["state"] == {}, "torch hands the full state to the first rank only"
    for result in (first, second):
        assert torch.equal(result["ratio"], expected["ratio"])
        torch.testing.assert_close(
            result["regularization"], expected["regularization"], rtol=1e-12, atol=1e-12
        )
        assert_same_report(result["report"], expected["report"])
        for mask, ratio in zip(result["masks"], result["layer_ratios"], strict=True):
            assert mask.sum() / mask.numel() == ratio
        if same_data:
            assert result["losses"] == expected["losses"]


def assert_same_report(actual, expected):
    assert actual["kept"] == expected["kept"] and actual["total"] == expected["total"]
    for mine, theirs in zip(actual["layers"], expected["layers"], strict=True):
        for key, value in theirs.items():
            wanted = pytest.approx(value, rel=1e-9) if key.startswith("threshold") else value
            assert mine[key] == wanted, key
