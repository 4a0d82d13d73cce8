"""Handle parameters that FSDP2 keeps sharded as DTensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether it is a DTensor; before torch.distributed.tensor is imported, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def rows_are_whole(tensor: DTensor) -> bool:
    """Return whether every row, along dimension 0, is on one rank."""
    return all(place.is_shard(0) or place.is_replicate() for place in tensor.placements)


def sum_over_shards(tensors: list[DTensor], local_sum: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return `local_sum` of the local shards, added over all ranks by one all-reduce.

    All `tensors` are DTensors on one mesh with equal placements. Gradients reach the local shards.
    """
    return _over_shards(local_sum([tensor.to_local() for tensor in tensors]), tensors[0])


def _over_shards(part: Tensor, like: DTensor) -> Tensor:
    """Return the sum of `part` over the ranks that `like` is sharded over."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if place.is_shard() else Replicate() for place in like.placements]
    return DTensor.from_local(part, like.device_mesh, partial).full_tensor()


def norm_over_shards(norm: Tensor, like: Tensor) -> Tensor:
    """Return the norm of the whole from `norm`, that of the local shard, sharded like `like`."""
    return _over_shards(norm.square(), like).sqrt() if is_dtensor(like) else norm


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole DTensor (a collective call, on all ranks); other tensors unchanged."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def reset_rows(shard: DTensor, reset: Tensor) -> None:
    """Set a sharded threshold (along dimension 0) to 0 where the unsharded mask `reset` is True."""
    from torch.distributed.tensor import distribute_tensor

    # All ranks have the same `reset`: each cuts its own part out.
    own = distribute_tensor(reset, shard.device_mesh, shard.placements, src_data_rank=None)
    local = shard.to_local()  # on the CPU under FSDP2's CPUOffloadPolicy
    local.masked_fill_(own.to_local().to(local.device), 0)
