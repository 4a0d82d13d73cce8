from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import dst_kernels
from dst_kernels.training import graphed
from dst_kernels.training.config import RunConfig
from dst_kernels.training.data import Data, TensorBatches
from dst_kernels.training.errors import DivergedError
from dst_kernels.training.loop import Observer, train
from dst_kernels.training.state import new_state

CPU = torch.device("cpu")


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(30, 1, 6, 6, generator=generator), torch.arange(30) % 3
    images[torch.arange(30), 0, labels] += 1
    return Data(TensorBatches(images, labels, 8), TensorBatches(images, labels, 7), (1, 6, 6), 3)


def run(config, data, observer=None):
    state = new_state(config, data, CPU)
    train(state, config, data, observer or Observer(), save=lambda state: None)
    return state


@pytest.mark.parametrize("dense", [False, True])
def test_training_is_cross_entropy_plus_alpha_times_the_regulariser(data, dense):
    config = RunConfig(dense=dense, alpha=0.02, lr=0.1, epochs=1, threshold_lr=0.05)
    trained = run(config, data).model

    model = new_state(config, data, CPU).model
    weights = [p for name, p in model.named_parameters() if not name.endswith("threshold")]
    thresholds = [p for name, p in model.named_parameters() if name.endswith("threshold")]
    buffers = [torch.zeros_like(p) for p in (*weights, *thresholds)]

    batches = []
    original = data.train.epoch

    def record(*given):
        for batch in original(*given):
            batches.append(batch)
            yield batch

    data.train.epoch = record
    run(config, data)
    assert len(batches) == 4
    for images, labels, _ in batches:
        loss = cross_entropy(model(images), labels)
        loss = loss + config.alpha * sum(torch.exp(-t).sum() for t in thresholds)
        gradients = torch.autograd.grad(loss, [*weights, *thresholds])
        with torch.no_grad():
            for p, gradient, buffer in zip(
                (*weights, *thresholds), gradients, buffers, strict=True
            ):
                buffer.mul_(0.9).add_(gradient)
                is_threshold = any(p is t for t in thresholds)
                p.sub_((0.05 if is_threshold else 0.1) * buffer)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    if not dense:
        assert all((t != 0).any() for t in thresholds)


def test_records_say_what_was_measured(data):
    config = RunConfig(epochs=3, alpha=0.05, lr=0.1)
    state = run(config, data)
    assert [record["epoch"] for record in state.history] == [1, 2, 3]
    last = state.history[-1]
    state.model.eval()
    with torch.no_grad():
        logits = state.model(data.test.images)
    assert last["test_accuracy"] == (logits.argmax(1) == data.test.labels).float().mean().item()
    assert last["test_loss"] == pytest.approx(
        cross_entropy(logits, data.test.labels).item(), rel=1e-5
    )
    report = dst_kernels.sparsity_report(state.model)
    assert last["remaining_ratio"] == report.remaining_ratio < 0.99
    assert last["layers"] == {layer.name: layer.remaining_ratio for layer in report.layers}
    assert last["train_loss"] < state.history[0]["train_loss"]
    assert state.seconds > 0


def test_the_dense_twin_remains_whole(data):
    history = run(RunConfig(epochs=2, dense=True), data).history
    assert [record["remaining_ratio"] for record in history] == [1.0, 1.0]
    assert [record["layers"] for record in history] == [{}, {}]


def test_learning_rates_drop_at_the_milestones(data):
    seen = []

    class Watch(Observer):
        def epoch(self, record):
            groups = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
            seen.append((record["lr"], groups["weights"], groups["thresholds"]))

    config = RunConfig(epochs=4, lr=0.1, threshold_lr=0.02, milestones=(1, 3), gamma=0.5)
    state = new_state(config, data, CPU)
    train(state, config, data, Watch(), save=lambda state: None)
    rates = [0.1, 0.05, 0.05, 0.025]
    assert seen == [pytest.approx((lr, lr, lr / 5)) for lr in rates]


def test_options_reach_the_optimizer(data):
    config = RunConfig(weight_decay=0.1, threshold_weight_decay=0.2, momentum=0.5)
    optimizer = new_state(config, data, CPU).optimizer
    assert isinstance(optimizer, dst_kernels.optim.DSTSGD)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.2]
    assert [g["momentum"] for g in optimizer.param_groups] == [0.5, 0.5]
    adam = new_state(RunConfig(optimizer="adam", lr=0.003), data, CPU).optimizer
    assert isinstance(adam, dst_kernels.optim.DSTAdamW)
    assert [(g["lr"], g["weight_decay"]) for g in adam.param_groups] == [(0.003, 0.0)] * 2


@pytest.mark.parametrize(
    ("execution", "kind", "options"),
    [
        ("deferred", torch.optim.SGD, {"weight_decay": 0.01, "lr": 0.1}),
        ("deferred", torch.optim.Adam, {"optimizer": "adam", "lr": 3e-3}),
        ("deferred", torch.optim.AdamW, {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.1}),
        ("grouped", torch.optim.Adam, {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.1}),
    ],
)
def test_the_fast_way_trains_as_layer_by_layer_does(data, execution, kind, options):
    config = RunConfig(epochs=3, alpha=0.05, **options)
    assert config.execution == execution
    plainly = replace(config, layer_by_layer=True)
    fast, plain = run(config, data), run(plainly, data)
    assert type(plain.optimizer) is kind and plainly.execution == "layer by layer"
    assert fast.history[-1]["remaining_ratio"] < 0.99
    start = new_state(config, data, CPU).model.state_dict()
    for name, value in plain.model.state_dict().items():
        moved = (value - start[name]).abs().max()
        assert moved > 0, name
        torch.testing.assert_close(
            fast.model.state_dict()[name], value, rtol=0, atol=float(moved) * 1e-4
        )
    for index, state in plain.optimizer.state_dict()["state"].items():
        found = fast.optimizer.state_dict()["state"][index]
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in state.items()}


def test_mixed_precision_computes_in_bf16_and_keeps_fp32_parameters(data):
    seen = []
    config = RunConfig(epochs=1, amp="bf16")
    state = new_state(config, data, CPU)
    state.model.fc2.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(state, config, data, Observer(), save=lambda state: None)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in state.model.parameters())


def test_a_run_that_diverges_stops_and_says_so(data):
    saved = []
    config = RunConfig(epochs=50, lr=1e20)
    state = new_state(config, data, CPU)
    with pytest.raises(DivergedError, match=r"epoch \d+ are .*(nan|inf).*--lr is 1e\+20"):
        train(state, config, data, Observer(), save=lambda s: saved.append(len(s.history)))
    assert len(saved) < 50
    for record in state.history:
        assert math.isfinite(record["train_loss"])
        assert math.isfinite(record["test_loss"])


def test_the_observer_hears_of_every_step_and_epoch(data):
    heard = []

    class Count(Observer):
        def step(self, total, samples):
            heard.append("step")

        def epoch(self, record):
            heard.append(record["epoch"])

    run(RunConfig(epochs=2), data, Count())
    assert heard == [*["step"] * 4, 1, *["step"] * 4, 2]


def test_one_epoch_does_not_depend_on_what_was_drawn_before(data):
    """Each epoch seeds everything anew: the ground on which resuming stands."""

    class Disturb(Observer):
        def epoch(self, record):
            torch.rand(100)

    config = RunConfig(epochs=3)
    plain, disturbed = run(config, data), run(config, data, Disturb())
    assert plain.history == disturbed.history


@pytest.mark.slow
def test_a_compiled_model_trains_as_an_eager_one(data):
    config = RunConfig(epochs=2, alpha=0.05, lr=0.1)
    eager, compiled = run(config, data), run(replace(config, compile=True), data)
    for ours, theirs in zip(compiled.history, eager.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["remaining_ratio"] == pytest.approx(theirs["remaining_ratio"], abs=2e-3)
    assert eager.history[-1]["remaining_ratio"] < 0.99


@pytest.mark.parametrize("dense", [False, True])
def test_a_graph_is_captured_once_an_epoch_and_gets_every_batch(data, monkeypatch, dense):
    """A capture needs a GPU; here a replay does the recorded step again."""
    captured = []

    def capture(step):
        captured.append(step)
        return step

    monkeypatch.setattr(graphed, "capture", capture)
    data = replace(data, train=TensorBatches(data.train.images, data.train.labels, 4))  # and a 2
    config = RunConfig(epochs=2, lr=0.1, alpha=0.02, dense=dense, milestones=(1,))
    plain, replayed = run(config, data), run(replace(config, graph=True), data)
    assert len(captured) == 2
    assert replayed.history == plain.history
    for name, value in plain.weights.items():
        assert torch.equal(replayed.weights[name], value)
