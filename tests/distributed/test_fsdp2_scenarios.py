"""FSDP2 beyond plain steps: resets, meta initialisation, checkpoints, sharing, refusals.

Workers run all scenarios in one pair of processes, since starting them takes longest.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from workers import (
    batch,
    build,
    collapse,
    full_state,
    masked_layers,
    run_workers,
    shard,
    train,
)

import dst_kernels

GRANULARITIES = ("row", "layer", "element")


def reset_worker(rank):
    """The shards right after one training and one eval forward over collapsed thresholds."""
    seen = {}
    for granularity, training in itertools.product(GRANULARITIES, (True, False)):
        model = shard(build(granularity), "layers").train(training)
        collapse(model)
        ratio = dst_kernels.remaining_ratio(model)  # of what the guard will leave
        images, _ = batch(0)
        output = model(images)
        reference = build(granularity).train(training)
        collapse(reference)
        seen[granularity, training] = {
            "thresholds": [
                layer.threshold.full_tensor().detach() for layer in masked_layers(model)
            ],
            "expected_output": reference(images).detach(),
            "ratio": ratio,
            "expected": [layer.threshold.detach() for layer in masked_layers(reference)],
            "output": output.detach(),
        }
    return seen


def zero_threshold_worker(rank):
    """One threshold of each layer is 0 by itself, which is no reset."""
    model = shard(build(), "layers")
    with torch.no_grad():
        for layer in masked_layers(model):
            local = layer.threshold.to_local()
            local.fill_(0.01)
            if rank == 0:
                local[0] = 0
    model(batch(0)[0])
    return [layer.threshold.full_tensor().detach() for layer in masked_layers(model)]


def meta_init_worker(rank):
    """Built on meta, sharded, given memory and values; the very first forward resets."""
    model = shard(build().to("meta"), "layers")
    model.to_empty(device="cpu")
    set_model_state_dict(
        model, build().state_dict(), options=StateDictOptions(full_state_dict=True)
    )
    collapse(model)
    output = model(batch(0)[0])
    after_first = [layer.threshold.full_tensor().detach() for layer in masked_layers(model)]
    output.sum().backward()
    return {
        "thresholds": after_first,
        "gradient": masked_layers(model)[0].threshold.grad is not None,
    }


def dense_checkpoint_worker(rank):
    """Dense checkpoints into sharded masked models: full ones, and sharded ones."""
    dense = dst_kernels.finalize_(build())
    expected = {name: value.clone() for name, value in dense.state_dict().items()}
    with torch.no_grad():
        for value in expected.values():
            value.add_(0.25)
    dense.load_state_dict(expected)
    model = shard(build(), "layers")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {**expected}, options=options)
    from_full = [p.full_tensor().detach() for p in model.state_dict().values()]
    model = shard(build(), "layers")
    with torch.no_grad():
        for layer in masked_layers(model):
            layer.threshold.fill_(0.5)
    model.load_state_dict(fully_shard(dense).state_dict(), strict=True)
    return {
        "names": list(model.state_dict()),
        "expected": expected,
        "full": from_full,
        "sharded": [p.full_tensor().detach() for p in model.state_dict().values()],
    }


def accumulate_worker(rank):
    """Two forwards before one backward, a reset in between; and the unsharded context."""
    model = shard(build(), "layers")
    reference = build()
    for each in (model, reference):
        first = each(batch(0)[0])
        collapse(each)
        second = each(batch(1)[0])
        (first.square().mean() + second.square().mean()).backward()
    return {
        "gradients": [p.grad.full_tensor() for p in model.parameters()],
        "expected": [p.grad for p in reference.parameters()],
        "thresholds": [layer.threshold.full_tensor().detach() for layer in masked_layers(model)],
    }


def mixed_precision_worker(rank):
    """16-bit parameters in forward and backward, float32 shards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build(dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    losses = train(model, model, lambda step: batch(step, torch.float32))
    return {"losses": losses, "state": full_state(model)}


def sharing_worker(rank):
    """Two layers with one weight and one threshold in one sharded group."""

    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).double()
        model[2].weight = model[0].weight
        return dst_kernels.sparsify_(model)

    plain, model = tied(), fully_shard(tied())
    regularization = []
    input = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for each in (plain, model):
        with torch.no_grad():
            each[0].threshold.fill_(5.0)
        regularization.append(dst_kernels.sparse_regularization(each).item())
        each(input).square().sum().backward()
    return {
        "regularization": regularization,
        "thresholds": [plain[0].threshold.detach(), model[0].threshold.full_tensor().detach()],
        "gradients": [plain[0].threshold.grad, model[0].threshold.grad.full_tensor()],
        "totals": [dst_kernels.sparsity_report(each).total for each in (plain, model)],
    }


def refusals_worker(rank):
    model = shard(build(), "layers")
    messages = {}
    for name, call in {
        "finalize": lambda: dst_kernels.finalize_(model),
        "to_dense": lambda: masked_layers(model)[0].to_dense(),
    }.items():
        try:
            call()
        except RuntimeError as error:
            messages[name] = str(error)
    late = fully_shard(nn.Linear(4, 4))
    plan = dst_kernels.plan_sparsify(late)
    return {"messages": messages, "reasons": [layer.reason for layer in plan.layers]}


def fixed_masks_worker(rank):
    """Masks fixed before or after sharding, or by a checkpoint; and under DDP."""

    def frozen():
        model = dst_kernels.prune_(build(), 0.5)
        return dst_kernels.freeze_masks_(model)

    alone = frozen()
    checkpoint = {name: value.clone() for name, value in alone.state_dict().items()}
    loaded = dst_kernels.freeze_masks_(shard(build(), "layers"))
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(loaded, {**checkpoint}, options=options)
    models = {
        "before": shard(frozen(), "layers"),
        "after": dst_kernels.freeze_masks_(
            shard(dst_kernels.prune_(build(), 0.5), "layers"),
        ),
        "loaded": loaded,
    }
    losses = {name: train(model, model, steps=4) for name, model in models.items()}
    wrapped = nn.parallel.DistributedDataParallel(frozen())
    losses["DDP"] = train(wrapped.module, wrapped, steps=4)
    return {
        "losses": losses,
        "expected": train(alone, alone, steps=4),
        "masks": [full_state(model) for model in models.values()],
        "expected_masks": checkpoint,
        "reports": [dst_kernels.sparsity_report(model).kept for model in (alone, *models.values())],
    }


SCENARIOS = {
    function.__name__: function
    for function in (
        reset_worker,
        zero_threshold_worker,
        meta_init_worker,
        dense_checkpoint_worker,
        accumulate_worker,
        mixed_precision_worker,
        sharing_worker,
        fixed_masks_worker,
        refusals_worker,
    )
}


def all_scenarios(rank):
    results = {}
    for name, function in SCENARIOS.items():
        try:
            results[name] = function(rank)
        except Exception as error:  # the same on all ranks, so that the others can go on
            results[name] = error
    return results


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    return run_workers(all_scenarios, tmp_path_factory.mktemp("fsdp"))


def results_of(scenarios, function):
    for result in scenarios:
        if isinstance(result[function.__name__], Exception):
            raise result[function.__name__]
    return [result[function.__name__] for result in scenarios]


@pytest.mark.slow
def test_a_training_forward_resets_the_shards_and_an_eval_forward_does_not(scenarios):
    for result in results_of(scenarios, reset_worker):
        for (_, training), seen in result.items():
            assert torch.equal(seen["output"], seen["expected_output"]) and seen["ratio"] == 1
            for actual, expected in zip(seen["thresholds"], seen["expected"], strict=True):
                assert torch.equal(actual, expected)
            assert seen["thresholds"][0].max() == (0 if training else 5)


@pytest.mark.slow
def test_a_threshold_that_is_zero_is_no_reset(scenarios):
    for result in results_of(scenarios, zero_threshold_worker):
        for threshold in result:
            expected = torch.full_like(threshold, 0.01)
            expected[0] = 0
            assert torch.equal(threshold, expected)


@pytest.mark.slow
def test_meta_initialisation_and_a_reset_in_the_first_forward(scenarios):
    for result in results_of(scenarios, meta_init_worker):
        assert all(torch.count_nonzero(threshold) == 0 for threshold in result["thresholds"])
        assert result["gradient"]


@pytest.mark.slow
def test_a_dense_checkpoint_loads_into_a_sharded_model(scenarios):
    for result in results_of(scenarios, dense_checkpoint_worker):
        for kind in ("full", "sharded"):
            for name, value in zip(result["names"], result[kind], strict=True):
                expected = result["expected"].get(name, torch.zeros_like(value))
                assert torch.equal(value, expected), (kind, name)


@pytest.mark.slow
def test_two_forwards_before_one_backward(scenarios):
    for result in results_of(scenarios, accumulate_worker):
        for actual, expected in zip(result["gradients"], result["expected"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert torch.count_nonzero(result["thresholds"][0]) == 0


@pytest.mark.slow
def test_mixed_precision_trains_and_resets(scenarios):
    for result in results_of(scenarios, mixed_precision_worker):
        assert torch.isfinite(torch.tensor(result["losses"])).all()
        for name, value in result["state"].items():
            assert value.dtype == torch.float32
            if name.endswith("threshold"):
                assert value.abs().max() < 1 and value.abs().max() > 0


@pytest.mark.slow
def test_shared_weights_under_sharding(scenarios):
    for result in results_of(scenarios, sharing_worker):
        assert result["regularization"][0] == pytest.approx(result["regularization"][1], rel=1e-12)
        assert all(torch.count_nonzero(threshold) == 0 for threshold in result["thresholds"])
        torch.testing.assert_close(*result["gradients"], rtol=1e-12, atol=1e-12)
        assert result["totals"] == [25, 25]


@pytest.mark.slow
def test_fixed_masks_under_sharding_and_ddp(scenarios):
    for rank, result in enumerate(results_of(scenarios, fixed_masks_worker)):
        for losses in result["losses"].values():
            assert losses == pytest.approx(result["expected"], rel=1e-10)
        assert len(set(result["reports"])) == 1
        masks = {n: m for n, m in result["expected_masks"].items() if "fixed_mask" in n}
        assert len(masks) == 4 and sum(mask.sum() for mask in masks.values()) > 0
        for state in result["masks"] if rank == 0 else ():  # only there
            assert all(torch.equal(state[name], mask) for name, mask in masks.items())


@pytest.mark.slow
def test_what_sharded_layers_refuse(scenarios):
    for result in results_of(scenarios, refusals_worker):
        assert set(result["messages"]) == {"finalize", "to_dense"}
        assert all("sharded" in message for message in result["messages"].values())
        assert "sharded already" in result["reasons"][0]
