"""Grouped layers and deferred optimizers over two gloo processes: the steps that one takes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from workers import (
    assert_same_state,
    batch,
    build,
    deferred_sgd,
    full_state,
    local_part,
    masked_layers,
    run_workers,
    sgd,
    shard,
    single_process,
    train,
)

import dst_kernels

CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # in float64: only the order of additions differs
SMALL = 0.003  # MB: more than one bucket even here
MAX_NORM = 0.05


def part(rank):
    return lambda step: tuple(local_part(tensor, rank) for tensor in batch(step))


def ddp(rank, mode, hooks_on, **options):
    model = build()
    wrapped = DistributedDataParallel(model, **options)
    called = wrapped if hooks_on == "wrapper" else model
    dst_kernels.group_(called, bucket_mb=SMALL)
    optimizer = sgd(model) if mode == "grouped" else deferred_sgd(model, called)
    assert len(buckets(called, wrapped, rank)) > 1
    losses = train(model, wrapped, part(rank), optimizer=optimizer)
    return finished(model, optimizer, losses, model.state_dict)


def buckets(called, wrapped, rank):
    """As the group sees them; one forward and backward so that DDP expects nothing more."""
    wrapped(part(rank)(0)[0]).sum().backward()
    wrapped.zero_grad()
    (group,) = {hook.__self__ for hook in called._forward_pre_hooks.values()}
    return group._plan[1]


def fsdp(rank, mode, wrapping):
    model = shard(build(), wrapping)
    if mode == "grouped":
        dst_kernels.group_(model)
    optimizer = sgd(model) if mode == "grouped" else deferred_sgd(model)
    losses = train(model, model, part(rank), optimizer=optimizer)
    return finished(model, optimizer, losses, lambda: full_state(model))


def finished(model, optimizer, losses, state):
    """A last forward: layer by layer a reset is committed there, a step later than deferred."""
    deferred = [layer._deferral is not None for layer in masked_layers(model)]
    thresholds = [layer.threshold.grad for layer in masked_layers(model)]
    model(batch(0)[0])
    return {"state": state(), "losses": losses, "deferred": deferred, "t.grad": thresholds}


def clipped(rank, sharded):
    """Norms, and the state after some steps with clipping: sharded, or in one process."""
    model = shard(build(), "layers") if sharded else build()
    optimizer = deferred_sgd(model)
    norms = []
    for step in range(5):
        images, targets = part(rank)(step) if sharded else batch(step)
        (model(images) - targets).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms), "state": full_state(model)}


def steps(model, optimizer, numbers, data):
    for step in numbers:
        images, targets = data(step)
        (model(images) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_state(model)


def loaded(model, path):
    """A model and its optimizer, with what `saved` has left."""
    optimizer = deferred_sgd(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return model, optimizer


def saved(rank, path):
    """The state some steps after a checkpoint: trained on, and loaded into another model."""
    model = shard(build(), "layers")
    optimizer = deferred_sgd(model)
    steps(model, optimizer, range(4), part(rank))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=path)
    trained = steps(model, optimizer, range(4, 8), part(rank))
    again = steps(*loaded(shard(build(), "layers"), path), range(4, 8), part(rank))
    return {"trained": trained, "again": again}


def steered(rank):
    """Alpha and thresholds of a process that sees its own half of the data."""
    model = build()
    controller = dst_kernels.TargetRatio(model, 0.5, 30, freeze=False)
    optimizer = dst_kernels.optim.DSTSGD(model, lr=0.05, alpha=controller)
    called = DistributedDataParallel(model)
    for step in range(12):
        images, targets = part(rank)(step)
        (called(images) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"alpha": controller.alpha, **model.state_dict()}


def mixed_precision(rank):
    """Under bfloat16 autocast: DistributedDataParallel wants float32 gradients all the same."""
    model = build(dtype=torch.float32)
    wrapped = DistributedDataParallel(model)
    optimizer = deferred_sgd(model)
    for step in range(3):
        images, targets = (tensor.float() for tensor in part(rank)(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = (wrapped(images).float() - targets).square().mean()
        loss.backward()
        dtypes = {layer.weight.grad.dtype for layer in masked_layers(model)}
        optimizer.step()
        optimizer.zero_grad()
    return {"dtypes": dtypes, "state": model.state_dict()}


DDP_RUNS = [
    ("grouped", "model", {}),
    ("grouped", "wrapper", {}),
    ("deferred", "model", {}),
    ("deferred", "wrapper", {}),
    ("deferred", "model", {"find_unused_parameters": True}),
    ("deferred", "model", {"gradient_as_bucket_view": True}),
    ("deferred", "model", {"static_graph": True}),
]
FSDP_RUNS = [
    (mode, wrapping) for mode in ("grouped", "deferred") for wrapping in ("layers", "root")
]


def all_runs(rank, folder):
    results = {str(run): ddp(rank, *run[:2], **run[2]) for run in DDP_RUNS}
    results |= {str(run): fsdp(rank, *run) for run in FSDP_RUNS}
    results["clipped"] = clipped(rank, sharded=True)
    results["saved"] = saved(rank, folder / "checkpoint")
    results["steered"] = steered(rank)
    results["mixed_precision"] = mixed_precision(rank)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    results = run_workers(all_runs, folder, folder)
    results[0]["checkpoint"] = folder / "checkpoint"
    return results


@pytest.fixture(scope="module")
def expected():
    """Layer by layer in one process, with torch's optimizer, after one more forward."""
    model = build()
    losses = train(model, model)
    assert losses == single_process()["losses"]
    model(batch(0)[0])
    return {"state": model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.mark.slow
@pytest.mark.parametrize("run", [*DDP_RUNS, *FSDP_RUNS], ids=str)
def test_same_trajectory_as_one_process(runs, expected, run):
    first, second = (result[str(run)] for result in runs)
    assert_same_state(first["state"], expected["state"], **CLOSE)
    mean = torch.tensor([first["losses"], second["losses"]], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, expected["losses"], **CLOSE)
    if run in DDP_RUNS:
        assert_same_state(first["state"], second["state"], rtol=0, atol=0)
    for result in (first, second):
        deferred = run[0] == "deferred"
        # The transposed convolution never is.
        assert result["deferred"] == [deferred, False, deferred, deferred]


@pytest.mark.slow
def test_the_norm_is_that_of_all_shards(runs):
    expected = clipped(0, sharded=False)
    assert (expected["norms"] > MAX_NORM).all(), "the limit matters"
    for result in runs:
        # The norm itself is a float32 number.
        torch.testing.assert_close(result["clipped"]["norms"], expected["norms"])
    assert_same_state(runs[0]["clipped"]["state"], expected["state"], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_go_on_with_any_number_of_processes(runs):
    trained, again = (runs[0]["saved"][name] for name in ("trained", "again"))
    assert_same_state(again, trained, rtol=0, atol=0)
    one = loaded(build(), runs[0]["checkpoint"])
    assert_same_state(steps(*one, range(4, 8), batch), trained, **CLOSE)


@pytest.mark.slow
def test_every_rank_steers_alike(runs):
    first, second = (result["steered"] for result in runs)
    assert first["alpha"] > 1e-6
    assert_same_state(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_ddp_under_autocast_reduces_float32_gradients(runs):
    first, second = (result["mixed_precision"] for result in runs)
    assert first["dtypes"] == {torch.float32}
    assert_same_state(first["state"], second["state"], rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in first["state"].values())
