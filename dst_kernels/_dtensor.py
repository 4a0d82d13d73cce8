"""Parameters that FSDP2 keeps sharded as DTensors."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor

__all__ = ["full_tensor", "is_dtensor", "reset_shard", "sum_over_shards"]


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing torch.distributed.tensor: before that import there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sum_over_shards(tensors: list[Tensor], local_sum: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`local_sum` of the local shards, added up over all ranks; one all-reduce.

    All `tensors` are DTensors on one mesh with equal placements. Gradients reach the local shards.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = tensors[0].device_mesh, tensors[0].placements
    partial = [Partial() if place.is_shard() else Replicate() for place in placements]
    total = local_sum([tensor.to_local() for tensor in tensors])
    return DTensor.from_local(total, mesh, partial).full_tensor()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor (a collective call: all ranks make it); other tensors as they are."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def reset_shard(shard: Tensor, threshold: Tensor, effective: Tensor) -> None:
    """Zero a sharded threshold in place where the guard reset the gathered one."""
    reset = ((effective == 0) & (threshold != 0)).any()
    shard.to_local().masked_fill_(reset, 0)
