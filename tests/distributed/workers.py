"""Starting worker processes over gloo, and the models and the training loop they all run."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import dst_kernels
from dst_kernels.nn import MaskedLayer

WORLD = 2
STEPS = 20
RESET_AT = 8  # before this step thresholds are raised so far that the guard resets them


def run_workers(function: Callable, folder: Path, *args: Any, seconds: float = 120) -> list[Any]:
    """`function(rank, *args)` in two processes with a gloo group; what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(_worker, (function, port, folder, args), nprocs=WORLD, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):  # raises what a worker raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} took more than {seconds} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _worker(rank: int, function: Callable, port: int, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Not by Python's own end, in which a process with sharded modules aborts now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def build(granularity: str = "row", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions and linear layers with odd row counts, so that shards are uneven."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 16, 7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ).to(dtype)
    dst_kernels.sparsify_(model, dst_kernels.SparsifyConfig(granularity=granularity))
    return model


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The global batch of a step: eight images and their targets."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return images.to(dtype), targets.to(dtype)


def local_part(tensor: Tensor, rank: int) -> Tensor:
    return tensor.chunk(WORLD)[rank]


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


@torch.no_grad()
def collapse(model: nn.Module) -> None:
    """Raise the thresholds of all masked layers but the last; sharded or not."""
    for layer in masked_layers(model)[:-1]:
        layer.threshold.fill_(5.0)


ALPHA = 0.02


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    groups = dst_kernels.parameter_groups(model, threshold_lr=0.05)
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9)


def deferred_sgd(model: nn.Module, called: nn.Module | None = None) -> dst_kernels.optim.DSTSGD:
    """The same steps from dense gradients; `called` is what wraps the model, if anything does."""
    groups = dst_kernels.parameter_groups(model, threshold_lr=0.05)
    root = model if called is None else called
    return dst_kernels.optim.DSTSGD(root, groups, lr=0.02, momentum=0.9, alpha=ALPHA)


def train(
    model: nn.Module,
    step_model: nn.Module,
    data: Callable[[int], tuple[Tensor, Tensor]] = batch,
    steps: int = STEPS,
    after_forward: Callable[[int], None] = lambda step: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """SGD with momentum, the regulariser on, one collapse on the way; the losses."""
    optimizer = sgd(model) if optimizer is None else optimizer
    in_loss = 0.0 if isinstance(optimizer, dst_kernels.optim.DSTSGD) else ALPHA
    losses = []
    for step in range(steps):
        if step == RESET_AT:
            collapse(model)
        images, targets = data(step)
        loss = (step_model(images) - targets).square().mean()
        after_forward(step)
        (loss + in_loss * dst_kernels.sparse_regularization(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def single_process(granularity: str = "row", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What one process gets with the whole batch."""
    model = build(granularity, dtype)
    losses = train(model, model, lambda step: batch(step, dtype))
    report = dst_kernels.sparsity_report(model)
    assert 0 < report.remaining_ratio < 1, "some weights are pruned"
    assert all(entry.threshold_max < 1 for entry in report.layers), "the reset happened"
    return {
        "losses": losses,
        "state": model.state_dict(),
        "report": report.to_dict(),
        "ratio": dst_kernels.remaining_ratio(model),
        "regularization": dst_kernels.sparse_regularization(model).detach(),
    }


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def shard(model: nn.Module, wrapping: str, **options: Any) -> nn.Module:
    """FSDP2 in place: every masked layer by itself and the rest ("layers"), or all at once."""
    if wrapping == "layers":
        for layer in masked_layers(model):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """On the first rank; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
