"""Compiled models read the W * M that the step made, and never a stale one."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dst_kernels.nn import MaskedConv2d, MaskedLinear
from dst_kernels.nn.sources import compiled
from dst_kernels.optim import DSTSGD


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST_ON_CPUS", 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Blocks(nn.Module):
    """Two masked layers, with an action in between; `forward` may recompute the second."""

    def __init__(self, between=None, recompute=False):
        super().__init__()
        self.first, self.second = MaskedLinear(12, 12), MaskedLinear(12, 12)
        self.between, self.recompute = between, recompute
        for layer in (self.first, self.second):
            layer.reset_threshold(0.05)

    def forward(self, input):
        hidden = self.first(input).relu()
        if self.between is not None:
            self.between(self)
        if self.recompute:
            return checkpoint(self.second, hidden, use_reentrant=False)
        return self.second(hidden)


class Pair:
    """An eager model with its optimizer, and its compiled twin, whose graphs are recorded."""

    def __init__(self, model, backend="aot_eager"):
        torch.manual_seed(1)
        self.graphs = []
        self.models = copy.deepcopy(model), model
        self.optimizers = [self.optimizer(each) for each in self.models]

        self.backend = torch._dynamo.lookup_backend(backend)
        self.run = self.models[0], torch.compile(model, backend=self.record, fullgraph=True)
        self.input = torch.randn(6, 12)

    def record(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)

    @staticmethod
    def optimizer(model):
        return DSTSGD(model, lr=0.1, momentum=0.9, alpha=1e-3)

    def both(self, action):
        return [action(model) for model in self.models]

    def step(self, forwards=1, autocast=contextlib.nullcontext):
        for run, optimizer in zip(self.run, self.optimizers, strict=True):
            optimizer.zero_grad()
            with autocast():
                outputs = [run(self.input * (i + 1)) for i in range(forwards)]
            sum(output.float().square().mean() for output in outputs).backward()
            optimizer.step()
        self.assert_same()

    def assert_same(self):
        ours, expected = (list(model.parameters()) for model in reversed(self.models))
        for p, q in zip(ours, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

    def packs(self):
        """Return how many weights each graph masks, in the order in which they were made."""
        return [
            sum("masked_weight" in str(node.target) for part in parts(graph) for node in part.nodes)
            for graph in self.graphs
        ]


def parts(module):
    return [each.graph for each in module.modules() if isinstance(each, torch.fx.GraphModule)]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_step_masks_in_the_graph(forwards, recompute):
    pair = Pair(Blocks(recompute=recompute))
    for _ in range(4):
        pair.step(forwards)
    assert pair.packs() == [0]


def test_small_weights_on_cpus_are_masked_in_the_graph(monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST_ON_CPUS", 12 * 12 * 4 + 1)
    pair = Pair(Blocks())
    pair.step(), pair.step()
    assert pair.packs() == [2] and pair.models[1].first._prepared is None


def test_inputs_of_another_dtype_are_masked_in_the_graph():
    pair = Pair(Blocks())
    with_autocast = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    pair.step(**with_autocast), pair.step(**with_autocast)
    assert pair.packs() == [0]
    assert pair.models[1].first._prepared[2].dtype is torch.bfloat16
    for _ in range(3):
        pair.step()
    assert pair.packs()[0] == 0 and pair.packs()[1:] and all(pair.packs()[1:])
    assert len(pair.packs()) <= 3


@torch.no_grad()
def written(model):
    model.first.weight.mul_(1.5)


def loaded(model):
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def moved(model):
    model.second.weight.data = model.second.weight.detach() * 2


def all_thresholds_high(model):
    model.first.reset_threshold(10.0)


CHANGES = [written, loaded, moved, all_thresholds_high]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(change):
    pair = Pair(Blocks())
    pair.step()
    for _ in range(3):
        pair.both(change)
        pair.step()
        pair.step()
    assert pair.packs() == [0, 2], "one graph for all changes"


def test_a_new_parameter_is_masked_in_the_graph():
    pair = Pair(Blocks())
    pair.step()
    for model in pair.models:
        model.second.weight = nn.Parameter(model.second.weight.detach() * 2)
    assert torch.equal(*(run(pair.input) for run in pair.run))
    assert pair.packs() == [0, 2]


def test_a_write_that_torch_does_not_record_is_announced():
    pair = Pair(Blocks())
    pair.step()
    pair.both(lambda model: model.first.weight.data.mul_(1.5))
    for optimizer in pair.optimizers:
        optimizer.refresh()
    pair.step(), pair.step()
    assert pair.packs() == [0, 2]


def in_place(model):
    with torch.no_grad():
        model.second.weight.mul_(0.9)


def by_list(model):
    with torch.no_grad():
        torch._foreach_mul_([model.second.weight], 0.9)


@pytest.mark.parametrize("between", [in_place, by_list])
def test_a_write_inside_the_graph_is_seen(between):
    """It comes after the guard has been asked."""
    pair = Pair(Blocks(between))
    for _ in range(3):
        pair.step()
    assert pair.packs()[0] == 1, "of the second layer, whose weight has changed"


def test_other_parameters_are_masked_in_the_graph():
    pair = Pair(Blocks())
    pair.step(), pair.step()
    swapped = {f"_orig_mod.{n}": 2 * p.detach() for n, p in pair.models[1].named_parameters()}
    names = {name.removeprefix("_orig_mod."): value for name, value in swapped.items()}
    actual = functional_call(pair.run[1], swapped, (pair.input,))
    assert torch.equal(actual, functional_call(pair.models[0], names, (pair.input,)))

    def inside(model, input):
        return functional_call(model, names, (input,))

    inside = torch.compile(inside, backend="aot_eager", fullgraph=True)
    assert torch.equal(inside(pair.models[1], pair.input), actual)


def test_evaluation_and_no_grad_mask_in_the_graph():
    pair = Pair(Blocks())
    pair.step(), pair.step()
    pair.both(lambda model: model.first.weight.data.mul_(1.5))  # which no stamp shows
    with torch.no_grad():
        assert torch.equal(*(run(pair.input) for run in pair.run))
    pair.both(lambda model: model.eval())
    assert torch.equal(*(run(pair.input) for run in pair.run))
    assert pair.packs()[1:] == [2, 2]


def test_frozen_weights_are_masked_in_the_graph():
    pair = Pair(Blocks())
    pair.step()
    pair.both(lambda model: model.first.weight.requires_grad_(False))
    pair.step(), pair.step()
    pair.both(written)
    pair.step()
    assert pair.packs() == [0, 1]


def test_a_skipped_step_leaves_it_right():
    pair = Pair(Blocks())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(4):
        for run, optimizer in zip(pair.run, pair.optimizers, strict=True):
            optimizer.zero_grad()
            loss = run(pair.input).square().mean() * (float("inf") if i == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        scaler.update()
        pair.assert_same()
    assert pair.packs() == [0]


def test_without_an_optimizer_and_copies():
    pair = Pair(Blocks())
    pair.step(), pair.step()
    twin = copy.deepcopy(pair.models[1])
    assert twin.first._prepared is None
    for optimizer in pair.optimizers:
        optimizer.release()
    for model in (*pair.models, twin):
        model.zero_grad()
    for run in (*pair.run, torch.compile(twin, backend="aot_eager", fullgraph=True)):
        run(pair.input).square().mean().backward()
    assert twin.first.threshold.grad is not None
    for p, q, r in zip(*(model.parameters() for model in (*pair.models, twin)), strict=True):
        assert torch.equal(p.grad, q.grad) and torch.equal(p.grad, r.grad)
    pair.optimizers = pair.both(pair.optimizer)
    pair.step(), pair.step()
    assert pair.packs()[0] == 0 and pair.packs()[-1] == 0


def test_blocks_compiled_one_by_one_share_their_graphs():
    """The model's hook renews what is stale before the first of them runs."""
    pair = Pair(nn.Sequential(*(Blocks() for _ in range(10))))
    for block in pair.models[1]:
        block.compile(backend=pair.record, fullgraph=True)
    pair.run = pair.models
    for i in range(5):
        if i == 2:
            pair.both(lambda model: written(model[3]))
        pair.step()
    assert pair.packs() == [0, 0]  # the first block's input needs no gradient


def test_a_backward_after_the_step_is_refused():
    """As in an eager model: the step has written what it needs."""
    pair = Pair(Blocks())
    late = pair.run[1](pair.input).sum()
    pair.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.slow
def test_under_inductor_with_a_convolution():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = MaskedConv2d(1, 4, 3, padding=1), MaskedLinear(48, 5)

        def forward(self, input):
            return self.second(self.first(input.view(6, 1, 3, 4)).relu().flatten(1))

    pair = Pair(Convolutions(), backend="inductor")
    for i in range(6):
        if i == 3:
            pair.both(written)
        pair.step(forwards=2)
    assert pair.packs() == [0, 2]
