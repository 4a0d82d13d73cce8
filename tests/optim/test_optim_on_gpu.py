"""What only a GPU can show of whole steps: nothing waits, they can be captured, few launches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.nn import MaskedLayer
from dst_kernels.optim import DSTSGD, DSTAdamW

pytestmark = pytest.mark.gpu
ALPHA = 1e-3
MODES = pytest.mark.parametrize("mode", ["layer by layer", "grouped", "deferred"])
RULES = pytest.mark.parametrize("rule", ["sgd", "adamw"])


@pytest.fixture(autouse=True)
def deterministic_convolutions():
    """Else not even two eager runs are the same."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


class Run:
    """A small network, its optimizer and one training step with everything in it."""

    def __init__(self, mode, rule, autocast=True):
        torch.manual_seed(0)
        self.autocast = autocast
        model = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 64, 72), nn.ReLU(), nn.Linear(72, 10),
        )  # fmt: skip
        self.model = dst_kernels.sparsify_(model).cuda().to(memory_format=torch.channels_last)
        self.deferred = mode == "deferred"
        if mode == "grouped":
            dst_kernels.group_(self.model)
        groups = dst_kernels.parameter_groups(self.model, threshold_lr=0.02)
        if rule == "sgd":
            options = {"lr": 0.05, "momentum": 0.9}
            ours, theirs = DSTSGD, torch.optim.SGD
        else:
            options = {"lr": 0.002}
            ours, theirs = DSTAdamW, torch.optim.AdamW
        if self.deferred:
            self.optimizer = ours(self.model, groups, alpha=ALPHA, **options)
        elif rule == "sgd":
            self.optimizer = theirs(groups, fused=True, **options)
        else:
            self.optimizer = theirs(groups, fused=True, capturable=True, **options)
        self.input = torch.randn(32, 8, 8, 8, device="cuda")
        self.target = torch.randint(0, 10, (32,), device="cuda")

    def next_batch(self, seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.input.normal_(generator=generator)
        self.target.random_(0, 10, generator=generator)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model(self.input), self.target)
        if not self.deferred:
            loss = loss + ALPHA * dst_kernels.sparse_regularization(self.model)
        loss.backward()
        self.optimizer.step()
        return loss

    def collapse(self):
        with torch.no_grad():
            self.model[4].threshold.fill_(10.0)

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@MODES
@RULES
def test_a_step_never_waits_for_the_gpu(mode, rule):
    run = Run(mode, rule)
    for _ in range(3):
        run.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@MODES
@RULES
def test_a_captured_step_does_what_an_eager_one_does(mode, rule):
    """Forward, loss, regulariser, backward, step and guard, over a reset within the replays."""
    eager, captured = Run(mode, rule), Run(mode, rule)
    warm_up = 3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(warm_up):
            captured.next_batch(seed)
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = captured.step()
    losses = []
    for seed in range(warm_up, 20):
        captured.next_batch(seed)
        graph.replay()
        losses.append(loss.item())
    expected = []
    for seed in range(20):
        eager.next_batch(seed)
        expected.append(eager.step().item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[warm_up:]))
    for name, value in eager.state().items():
        torch.testing.assert_close(captured.state()[name], value, rtol=1e-3, atol=1e-5)


@RULES
def test_the_guard_decides_within_a_captured_deferred_step(rule):
    """Thresholds that the step itself raises too far are back at 0 when it ends."""
    run = Run("deferred", rule)
    for seed in range(3):
        run.next_batch(seed)
        run.step()
    graph = torch.cuda.CUDAGraph()
    run.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        run.step()
    layer = run.model[4]
    graph.replay()
    assert layer.threshold.abs().max() > 0
    for state in run.optimizer.state.values():  # momentum that no threshold withstands
        for name in ("momentum_buffer", "exp_avg"):
            if name in state and state[name].shape == layer.threshold.shape:
                state[name].fill_(-1e6)
    graph.replay()
    assert bool((layer.threshold == 0).all())
    masked = run.optimizer._deferral.fresh([layer])[layer]
    assert torch.equal(masked, layer.weight.to(masked.dtype))


@RULES
def test_modes_agree(rule):
    """In float32: with 16 bits, weights beside their thresholds end on different sides."""
    modes = "layer by layer", "grouped", "deferred"
    runs = [Run(mode, rule, autocast=False) for mode in modes]
    for seed in range(10):
        for run in runs:
            run.next_batch(seed)
            run.step()
    plain, *others = (run.state() for run in runs)
    for other in others:
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def kernels(run):
    run.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)


class Dense(Run):
    def __init__(self, rule):
        super().__init__("layer by layer", rule)
        self.model = dst_kernels.finalize_(self.model)
        lr = 0.05 if rule == "sgd" else 0.002
        if rule == "sgd":
            parameters = self.model.parameters()
            self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        self.deferred = True  # no regulariser in the loss


@RULES
def test_a_deferred_step_adds_at_most_three_launches(rule):
    deferred, dense = Run("deferred", rule), Dense(rule)
    for run in (deferred, dense):
        for _ in range(3):
            run.step()
    assert any(isinstance(module, MaskedLayer) for module in deferred.model.modules())
    assert kernels(deferred) <= kernels(dense) + 3
