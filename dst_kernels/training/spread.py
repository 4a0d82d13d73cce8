"""Spread a model over processes: copied by DDP, or cut in pieces by FSDP2."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..ops.dtensor import full_tensor, is_dtensor
from . import processes

# FSDP2 is imported where it is used: that takes half a second, and not every torch has it.


def copied(model: nn.Module) -> nn.Module:
    """Return the module to call, which averages gradients over the processes in its backward."""
    # Batch norms differ within an epoch; `average_buffers` makes them equal at its end.
    parameters = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers"  # in torch 2.14
    options: dict[str, Any] = {renamed if renamed in parameters else "broadcast_buffers": False}
    return DistributedDataParallel(model, **options)


def shard_(model: nn.Module) -> None:
    """Keep of each parameter only this process's part, and gather the others block by block.

    A block is an item of an nn.Sequential or nn.ModuleList with a weight of two or more dimensions;
    what is in none is gathered with the model. The model must be on its device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (processes.count(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        if listed and not isinstance(child, (nn.Sequential, nn.ModuleList)):
            if any(parameter.ndim > 1 for parameter in child.parameters()):
                yield child
        else:
            yield from _blocks(child)


@contextlib.contextmanager
def synchronised(called: nn.Module, wanted: bool) -> Iterator[None]:
    """Average gradients in the backwards within this scope only if `wanted`."""
    if isinstance(called, DistributedDataParallel) and not wanted:
        with called.no_sync():
            yield
        return
    if processes.joined() and not isinstance(called, DistributedDataParallel):
        called.set_requires_gradient_sync(wanted)  # type: ignore[operator]  # it is an FSDPModule
    yield


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics."""
    for buffer in model.buffers():
        if processes.joined() and buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer.div_(processes.count())


def whole(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy of a state dict on the CPU, with what is sharded put together.

    All processes must call this.
    """

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return whole(value)
        if not isinstance(value, Tensor):
            return value
        return full_tensor(value).to("cpu", copy=True)

    return {name: one(value) for name, value in values.items()}


def adopt_state(optimizer: torch.optim.Optimizer, whole_one: torch.optim.Optimizer) -> None:
    """Give the optimizer of a sharded model the state of one over the same, whole parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = whole_one.state_dict()["state"]
    optimizer.load_state_dict(
        {
            "state": {i: _cut_like(parameters[i], values) for i, values in state.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _cut_like(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    if not is_dtensor(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value, mesh, placements)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in values.items()
    }
