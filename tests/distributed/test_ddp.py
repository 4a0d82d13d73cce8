"""Two gloo processes under DistributedDataParallel take the steps that one process takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from workers import assert_same_state, batch, build, local_part, run_workers, single_process, train

import dst_kernels

GRANULARITIES = ("row", "layer", "element")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # in float64: only the order of additions differs


def ddp_worker(rank, granularity, same_data):
    model = build(granularity)

    def data(step):
        images, targets = batch(step)
        return (
            (images, targets)
            if same_data
            else (local_part(images, rank), local_part(targets, rank))
        )

    wrapped = DistributedDataParallel(model)
    resets = []

    def note_resets(step):
        resets.append(
            all(layer.threshold.abs().max() < 1 for layer in model if hasattr(layer, "threshold"))
        )

    losses = train(model, wrapped, data, after_forward=note_resets)
    return {
        "state": model.state_dict(),
        "losses": losses,
        "resets": resets,
        "report": dst_kernels.sparsity_report(model).to_dict(),
    }


def all_runs(rank):
    return {
        (granularity, same_data): ddp_worker(rank, granularity, same_data)
        for granularity, same_data in [*((g, False) for g in GRANULARITIES), ("row", True)]
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both processes, which run everything since starting them takes longest."""
    return run_workers(all_runs, tmp_path_factory.mktemp("ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_same_trajectory_as_one_process(runs, granularity):
    expected = single_process(granularity)
    results = [run[granularity, False] for run in runs]
    for result in results:
        assert_same_state(result["state"], expected["state"], **CLOSE)
        assert all(result["resets"]), "the forward after the collapse commits the reset"
        assert result["report"]["kept"] == expected["report"]["kept"]
    mean = torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected["losses"], dtype=torch.float64), **CLOSE)
    assert_same_state(results[0]["state"], results[1]["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_bit_equal_where_every_process_sees_the_same_data(runs):
    """The average of two equal gradients is exact, so nothing may differ at all."""
    expected = single_process("row")
    for run in runs:
        result = run["row", True]
        assert_same_state(result["state"], expected["state"], rtol=0, atol=0)
        assert result["losses"] == expected["losses"]
