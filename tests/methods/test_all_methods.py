"""What every method must hold to: checkpoints, copies, reports, processes, compiled models."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import dst_kernels
from dst_kernels import methods
from dst_kernels.methods.method import Method
from tests.distributed.workers import local_part, run_workers

STEPS = 12
CASES: dict[str, Callable[..., Method]] = {  # (model, optimizer, density, **options) of all methods
    "SET": lambda *args, **common: methods.SET(*args, every=3, **common),
    "DeepR": lambda *args, **common: methods.DeepR(*args, l1=1e-2, noise=1e-2, **common),
    "DynamicNetworkSurgery": lambda *args, **common: methods.DynamicNetworkSurgery(
        *args, steps=STEPS, begin=0.3, until=1.0, **common
    ),
    "DynamicSparseReparameterization": lambda *args, **common: (
        methods.DynamicSparseReparameterization(
            *args, every=3, steps=STEPS, exchange=30, threshold=0.02, **common
        )
    ),
    "MagnitudePruning": lambda *args, **common: methods.MagnitudePruning(
        *args, every=3, steps=STEPS, **common
    ),
    "RigL": lambda *args, **common: methods.RigL(*args, every=3, steps=STEPS, **common),
    "SparseMomentum": lambda *args, **common: methods.SparseMomentum(
        *args, every=3, steps=STEPS, **common
    ),
    "STR": lambda model, optimizer, _density, **common: methods.STR(
        model, optimizer, start=-3.0, weight_decay=0.1, **common
    ),
}
COUNT_IS_KEPT = ("SET", "DeepR", "DynamicSparseReparameterization", "RigL")
RANDOM = ("SET", "DeepR", "DynamicSparseReparameterization", "RigL", "SparseMomentum")
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(
        dst_kernels.parameter_groups(model), lr=0.1, momentum=0.9, weight_decay=1e-3
    ),
    "AdamW": lambda model: torch.optim.AdamW(dst_kernels.parameter_groups(model), lr=0.01),
    "DSTSGD": lambda model: dst_kernels.optim.DSTSGD(model, lr=0.1, momentum=0.9),
}
every_method = pytest.mark.parametrize("name", CASES)


class Mixed(nn.Module):
    """A convolution and a transposed one, an LSTM, and two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.back = nn.ConvTranspose2d(6, 4, 2)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.back(self.conv(images).relu()).relu().flatten(2)
        hidden = self.lstm(hidden)[0][:, -1]
        return self.last(self.second(self.first(hidden).relu()).relu())


def build(name: str, optimizer: str = "SGD", layout: Any = torch.contiguous_format, **common: Any):
    torch.manual_seed(0)
    model = dst_kernels.sparsify_(Mixed().to(memory_format=layout))
    trained_by = OPTIMIZERS[optimizer](model)
    return model, trained_by, CASES[name](model, trained_by, 0.3, **common)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    steps: range = range(STEPS),
    data: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    for step in steps:
        torch.manual_seed(step)
        images, targets = data(torch.randn(8, 2, 5, 5)), data(torch.randn(8, 3))
        (model(images) - targets).square().mean().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()


def masks(method: Method) -> list[Tensor]:
    return [layer.mask.clone() for layer in method.layers]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def states(*parts: Any) -> list[dict]:
    return [part.state_dict() for part in parts]


def test_every_method_has_a_case():
    assert set(CASES) == set(methods.__all__)


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(name: str, optimizer: str):
    run = build(name, optimizer)
    start = masks(run[2])
    train(*run, range(7))
    file = io.BytesIO()
    torch.save(states(*run), file)
    file.seek(0)
    train(*run, range(7, STEPS))
    assert not same(start, masks(run[2])), "masks change in this run"
    again = build(name, optimizer, seed=0)
    for part, state in zip(again, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(*again, range(7, STEPS))
    assert same(states(*run), states(*again))


@every_method
def test_copies_go_on_like_their_original(name: str):
    run = build(name)
    train(*run, range(5))
    again = copy.deepcopy(run)
    train(*again, range(5, STEPS))
    train(*run, range(5, STEPS))
    assert same(states(*run), states(*again))


@every_method
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reports_and_export_know_the_masks(name: str, layout: torch.memory_format):
    model, optimizer, method = build(name, layout=layout, dense=["last"])
    counts = []
    for step in range(STEPS):
        train(model, optimizer, method, range(step, step + 1))
        counts.append(sum(int(mask.sum()) for mask in masks(method)))
    if name in COUNT_IS_KEPT:
        weights = sum(layer.weight.numel() for layer in method.layers)
        assert set(counts) == {round(0.3 * weights)}
    report = {entry.name: entry for entry in dst_kernels.sparsity_report(model).layers}
    assert report["last"].remaining_ratio == 1
    for layer, mask in zip(method.layers, masks(method), strict=True):
        assert all(torch.equal(part.fixed_mask, mask) for part in layer.parts)
        assert report[layer.names[0]].kept == int(mask.sum())
    assert model.conv.weight.is_contiguous(memory_format=layout)
    images = torch.randn(2, 2, 5, 5)
    expected = model(images)
    dst_kernels.finalize_(model)
    torch.testing.assert_close(model(images), expected)
    assert type(model.conv) is nn.Conv2d and not [*model.buffers()]


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_decides_what_is_random(name: str):
    runs = [build(name, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        train(*run)
    first, second, third = (masks(run[2]) for run in runs)
    assert same(first, second) and not same(first, third)


def _in_process(rank: int, name: str) -> list[dict]:
    model, optimizer, method = build(name)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    train(model, optimizer, method, data=lambda batch: local_part(batch, rank))
    return states(model, optimizer, method)


def _in_processes(rank: int) -> dict[str, list[dict]]:
    return {name: _in_process(rank, name) for name in CASES}


def test_all_processes_choose_the_same(tmp_path: Path):
    first, second = run_workers(_in_processes, tmp_path)
    for name in CASES:
        assert same(first[name], second[name]), name


class NeverWait(TorchDispatchMode):
    """Raise where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        assert func._schema.name.removeprefix("aten::") not in waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in CASES if name != "DeepR"])  # it always changes
def test_nothing_waits_for_the_device_while_masks_stay(name: str):
    model, optimizer, method = build(name)
    (model(torch.ones(2, 2, 5, 5))).sum().backward()
    optimizer.step()
    with NeverWait():
        method.step()
    with pytest.raises(AssertionError), NeverWait():
        bool(model.last.bias.sum())


@pytest.mark.slow
@every_method
def test_compiled_models_follow(name: str):
    model, optimizer, method = build(name)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    train(compiled, optimizer, method, range(4))  # masks have changed once
    known = len(graphs)
    train(compiled, optimizer, method, range(4, STEPS))
    assert known == len(graphs) > 0, "further changes compile nothing anew"
    expected = build(name)
    train(*expected)
    assert same(masks(method), masks(expected[2]))


BAD: dict[str, tuple[dict, str]] = {
    "density": ({"density": 0}, "density must be positive and finite, but is 0"),
    "large density": ({"density": 1.5}, "density must be at most 1, but is 1.5"),
    "text": ({"density": "0.1"}, "density must be a number, positive and finite, but is '0.1'"),
    "seed": ({"seed": -1}, "seed must be at least 0, but is -1"),
    "dense": ({"dense": "last"}, "dense must be a collection of names of layers, but is 'last'"),
    "unknown": ({"dense": ["0", "head"]}, "dense: head is not among the masked layers, which"),
    "all": ({"dense": ["0"]}, "dense: that is all masked layers"),
    "optimizer": ({"optimizer": None}, "optimizer must be a torch optimizer, but is None"),
}


@pytest.mark.parametrize(
    ("name", "bad"),
    # STR takes no density
    [(n, bad) for n in CASES for bad in BAD if n != "STR" or "density" not in BAD[bad][0]],
)
def test_bad_input_changes_nothing(name: str, bad: str):
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(4, 3)))
    options, message = BAD[bad]
    options = {"density": 0.5, "optimizer": OPTIMIZERS["SGD"](model), **options}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError)) as caught:
        CASES[name](model, options.pop("optimizer"), options.pop("density"), **options)
    assert str(caught.value).startswith(message)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("SET", {"every": 0}, "every must be at least 1, but is 0"),
        ("SET", {"rate": 1.1}, "rate must be at most 1, but is 1.1"),
        ("SET", {"distribution": "erk"}, "distribution must be one of uniform, erdos_renyi, "),
        ("SET", {"separate_signs": 1}, "separate_signs must be True or False, but is 1"),
        ("DynamicSparseReparameterization", {"until": -0.1}, "until must be at least 0 and finite"),
        ("DynamicSparseReparameterization", {"exchange": 0.5}, "exchange must be an integer"),
        ("DynamicSparseReparameterization", {"threshold": 0}, "threshold must be positive"),
        ("RigL", {"steps": 1.0}, "steps must be an integer of at least 1, but is 1.0"),
        ("SparseMomentum", {"final_rate": 2}, "final_rate must be at most 1, but is 2"),
        ("SparseMomentum", {"keep_density": None}, "keep_density must be True or False"),
    ],
)
def test_bad_options_of_a_rule_change_nothing(method: str, options: dict, message: str):
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(4, 3)))
    rule = getattr(methods, method)
    options = {"every": 1, **({} if method == "SET" else {"steps": 10}), **options}
    with pytest.raises((TypeError, ValueError)) as caught:
        rule(model, OPTIMIZERS["SGD"](model), 0.5, **options)
    assert str(caught.value).startswith(message)
    assert not [*model.buffers()]


def test_models_that_do_not_fit_are_told_why():
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer does not train the weight of 1"):
        methods.SET(model, part, 0.5, every=1)
    optimizer = OPTIMIZERS["SGD"](model)
    method = methods.SET(model, optimizer, 0.5, every=1)
    with pytest.raises(ValueError, match=r"the mask of 0 is fixed: call dst_kernels\.unfreeze"):
        methods.RigL(model, optimizer, 0.5, steps=1)
    with pytest.raises(ValueError, match="state is not that of SET: no steps_done"):
        method.load_state_dict({})
    dst_kernels.unfreeze_masks_(model)
    method.step()
    with pytest.raises(RuntimeError, match="the mask of 0 is no longer fixed"):
        method.step()
