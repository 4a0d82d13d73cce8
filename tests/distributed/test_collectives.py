"""What a step sends over 8, 64 and 1,024 processes: counted, and as docs/scale.md has it.

torch's fake process group is one process of as many as one likes; its collectives move nothing, but
the profiler sees each with its tensors. What is not the fake group's: how long anything takes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from workers import masked_layers

import dst_kernels

# (process, processes): at 64 and 1,024 the last one, whose shards of small layers are empty.
WORLDS = [(0, 8), (63, 64), (1023, 1024)]
MODES = ("layer by layer", "grouped", "DSTSGD", "DSTAdamW")
IMAGES = torch.randn(4, 2, 5, 5)
BUCKET_MB = 0.003  # for DistributedDataParallel: several buckets even here
KINDS = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
}

Traffic = Counter  # how often by (kind, bytes of the whole: of what a process gathers or reduces)
Unit = list[tuple[tuple[int, ...], bool]]  # shapes that are sent together; whether of a threshold


@pytest.fixture(params=WORLDS, ids=lambda world: f"{world[1]}")
def processes(request) -> Iterator[int]:
    rank, size = request.param
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    yield size
    dist.destroy_process_group()


# -- the formulas ----------------------------------------------------------------------------------


def of_ddp(units: list[Unit]) -> Traffic:
    """All gradients in float32; where a DST optimizer leaves a threshold none, DDP sends zeros."""
    return Counter({("all-reduce", 4 * elements(units, 1)): 1})


def of_fsdp(
    units: list[Unit], shards: int, *, replicas: int = 1, mode: str = "dense", gathered: int = 4
) -> Traffic:
    """A unit is gathered before its forward and its backward; the last one, the root, once.

    `gathered`: bytes of an element then; gradients have 4. Without gradients of thresholds, which
    DST optimizers make, those are not sent.
    """
    expected: Traffic = Counter()
    for unit in units:
        weights, thresholds = (
            sum(padded(shape, shards) for shape, of_threshold in unit if of_threshold is kind)
            for kind in (False, True)
        )
        gathers = 1 if unit is units[-1] else 2
        expected["all-gather", gathered * (weights + thresholds)] += gathers
        gradients = 4 * (weights if mode.startswith("DST") else weights + thresholds)
        expected["reduce-scatter", gradients] += 1
        if replicas > 1:
            expected["all-reduce", gradients // shards] += 1
    return expected + regulariser(mode)


def regulariser(mode: str) -> Traffic:
    """Its value in the loss is one sum over all shards; the alpha of an optimizer needs none."""
    return Counter({("all-reduce", 4): 1} if mode in ("layer by layer", "grouped") else {})


def padded(shape: tuple[int, ...], shards: int) -> int:
    """Elements with which FSDP2 sends a parameter: it cuts rows, the same number for all."""
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])


def elements(units: list[Unit], shards: int) -> int:
    return sum(padded(shape, shards) for shape, _ in chain(*units))


def sent(traffic: Traffic, size: int) -> float:
    """Bytes that each process sends if these collectives are rings."""
    rounds = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
    return sum(rounds[kind] * n * bytes for (kind, bytes), n in traffic.items()) * (size - 1) / size


def masked(*shapes: tuple[int, ...]) -> Unit:
    return [entry for shape in shapes for entry in ((shape, False), ((shape[0],), True))]


def resnet50() -> list[Unit]:
    """One unit per block; the root has the first convolution and the last layer."""
    units, inputs = [], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels = [(planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            kernels += [] if block else [(4 * planes, inputs, 1, 1)]
            units.append(masked(*kernels) + [((kernel[0],), False) for kernel in kernels] * 2)
            inputs = 4 * planes
    rest = [((64,), False), ((64,), False), ((1000,), False)]
    return [*units, masked((64, 3, 7, 7), (1000, 2048)) + rest]


def llama_7b() -> list[Unit]:
    """One unit per decoder layer; the root has the embedding, the last norm and the head."""
    wide, hidden, words = 4096, 11008, 32000
    norm = ((wide,), False)
    block = masked(*[(wide, wide)] * 4, (hidden, wide), (hidden, wide), (wide, hidden))
    root = [((words, wide), False), norm, *masked((words, wide))]
    return [*[[*block, norm, norm]] * 32, root]


# -- counting --------------------------------------------------------------------------------------


def counted(step: Callable[[], object]) -> Traffic:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        step()
    found: Traffic = Counter()
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name.startswith("c10d::"):
            sizes = [
                each.dtype.itemsize * math.prod(each.sizes)
                for given in event.extra_fields.inputs
                for each in (given if isinstance(given, list) else [given])
                if hasattr(each, "sizes")
            ]
            found[KINDS[event.name], max(sizes)] += 1
    return found


def build(mode: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(45, 16), nn.LayerNorm(16), nn.Linear(16, 70)),
        nn.Linear(70, 3, bias=False),
    )
    return model if mode == "dense" else dst_kernels.sparsify_(model)


def units_of(model: nn.Sequential) -> list[Unit]:
    """The convolution, the block and the root with the rest, as `wrapped` wraps them."""
    return [
        [(tuple(p.shape), name.endswith("threshold")) for name, p in part.named_parameters()]
        for part in (model[0], model[2], model[3])
    ]


def wrapped(model: nn.Module, wrapper: str, size: int) -> nn.Module:
    if wrapper == "DDP":
        parallel = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)
        parallel.register_comm_hook(None, all_reduce)
        return parallel
    shape = (size // 4, 4) if wrapper == "HSDP" else (size,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    policy = MixedPrecisionPolicy()
    if wrapper == "FSDP2 in bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def all_reduce(_, bucket):  # without annotations, which torch wants to be no strings
    """As DistributedDataParallel does, which finds no result in what the fake group returns."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def prepared(mode: str, wrapper: str, size: int) -> tuple[nn.Module, nn.Module, Any]:
    """The model, what is called in its place, and the optimizer."""
    model = build(mode)
    called = wrapped(model, wrapper, size)
    if mode == "grouped":
        dst_kernels.group_(model)
    if mode.startswith("DST"):
        return model, called, getattr(dst_kernels.optim, mode)(model, lr=0.1, alpha=0.01)
    return model, called, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step_of(mode: str, wrapper: str, size: int, clip: bool = False) -> Callable[[], None]:
    """A training step, run often enough that nothing is sent for the first time."""
    model, called, optimizer = prepared(mode, wrapper, size)

    def step() -> None:
        loss = called(IMAGES).float().square().mean()
        if mode in ("layer by layer", "grouped"):
            loss = loss + 0.01 * dst_kernels.sparse_regularization(model)
        loss.backward()
        if clip and mode.startswith("DST"):
            optimizer.clip_grad_norm_(1.0)
        elif clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    if wrapper == "DDP":  # it has found its final buckets, and sends their sizes
        step()
    return step


@pytest.mark.parametrize("mode", MODES)
def test_ddp_all_reduces_four_bytes_more_per_threshold(processes, mode):
    dense, masked = (counted(step_of(each, "DDP", processes)) for each in ("dense", mode))
    assert masked.total() == dense.total() > 1
    assert {kind for kind, _ in dense + masked} == {"all-reduce"}
    for name, traffic in (("dense", dense), (mode, masked)):
        assert sent(traffic, processes) == sent(of_ddp(units_of(build(name))), processes)
    added = sum(n * bytes for (_, bytes), n in masked.items())
    added -= sum(n * bytes for (_, bytes), n in dense.items())
    assert added == 4 * (5 + 16 + 70 + 3)


@pytest.mark.parametrize("wrapper", ["FSDP2", "FSDP2 in bfloat16", "HSDP"])
def test_fsdp_sends_thresholds_with_their_weights(processes, wrapper):
    shards = 4 if wrapper == "HSDP" else processes
    options = {"replicas": processes // shards, "gathered": 2 if "bfloat16" in wrapper else 4}
    dense = counted(step_of("dense", wrapper, processes))
    assert dense == of_fsdp(units_of(build("dense")), shards, **options)
    for mode in MODES:
        masked = counted(step_of(mode, wrapper, processes))
        assert masked == of_fsdp(units_of(build(mode)), shards, mode=mode, **options), mode
        assert masked.total() == dense.total() + regulariser(mode).total(), mode


@pytest.mark.parametrize("mode", ["dense", "layer by layer", "DSTSGD"])
def test_clipping_is_one_collective(processes, mode):
    step, parameters = step_of(mode, "FSDP2", processes, clip=True), [*build(mode).parameters()]
    norms = 1 if mode == "DSTSGD" else len(parameters)  # torch has one per parameter
    expected = of_fsdp(units_of(build(mode)), processes, mode=mode)
    assert counted(step) == expected + Counter({("all-reduce", 4 * norms): 1})


@pytest.mark.parametrize("processes", WORLDS[:1], indirect=True)
def test_a_ratio_is_one_sum_and_a_report_gathers_all_masked_weights(processes):
    model, *_ = prepared("layer by layer", "FSDP2", processes)
    layers = masked_layers(model)
    pairs = Counter({("all-reduce", 2 * 8 * len(layers)): 1})  # two counts a layer, in int64
    assert counted(lambda: dst_kernels.remaining_ratio(model)) == pairs
    parts = [part for layer in layers for part in (layer.weight, layer.threshold)]
    gathered = Counter(("all-gather", 4 * padded(part.shape, processes)) for part in parts)
    assert counted(lambda: dst_kernels.sparsity_report(model)) == gathered


@pytest.mark.parametrize("processes", WORLDS[:1], indirect=True)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_a_sharded_masked_layer_keeps_no_copy_of_its_weight(processes, mode, wrapper):
    _, called, _ = prepared(mode, wrapper, processes)
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        called(IMAGES)
    weights = [5 * 2 * 3 * 3, 16 * 45, 70 * 16, 3 * 70]  # no activation is as large
    copies = [t.numel() for t in saved if t.dtype == torch.bfloat16 and t.numel() in weights]
    assert copies == ([] if wrapper == "FSDP2" and mode != "dense" else weights)


@pytest.mark.parametrize(
    ("name", "units", "digits"),
    [("ResNet-50", resnet50(), 1), ("Llama 7B", llama_7b(), 0)],
    ids=["ResNet-50", "Llama 7B"],
)
def test_the_page_has_what_the_formulas_say(name, units, digits):
    page = Path(__file__).parents[2].joinpath("docs", "scale.md").read_text(encoding="utf-8")
    plain = [[entry for entry in unit if not entry[1]] for unit in units]
    weights, thresholds = (elements(each, 1) for each in (plain, units))
    thresholds -= weights
    assert f"| {name} | {weights:,} |" in page
    assert f"| {thresholds:,} | {thresholds / weights:.3%} |".replace("%", " %") in page

    def compare(label: str, of: Callable[[list[Unit], str, int], float], mode: str) -> None:
        """One row for the dense model, one for what DST adds, at each size."""
        before = [of(plain, "dense", n) / 1e6 for n in (8, 64, 1024)]
        more = [
            of(units, mode, n) / 1e6 - each for n, each in zip((8, 64, 1024), before, strict=True)
        ]
        assert (
            f"| {name}, dense | " + "".join(f"{each:,.{digits}f} MB | " for each in before) in page
        )
        assert f"| + DST, {label} | " + "".join(f"{each:.3f} MB | " for each in more) in page

    compare("any mode", lambda units, _, n: sent(of_ddp(units), n), "")
    for label, mode in (("layer by layer or grouped", "layer by layer"), ("deferred", "DSTSGD")):
        compare(label, lambda units, mode, n: sent(of_fsdp(units, n, mode=mode), n), mode)
