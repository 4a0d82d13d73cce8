"""Parameters that FSDP2 keeps sharded as DTensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Without importing torch.distributed.tensor: before that import there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sum_over_shards(tensors: list[DTensor], local_sum: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`local_sum` of the local shards, added up over all ranks; one all-reduce.

    All `tensors` are DTensors on one mesh with equal placements. Gradients reach the local shards.
    """
    return _over_shards(local_sum([tensor.to_local() for tensor in tensors]), tensors[0])


def _over_shards(part: Tensor, like: DTensor) -> Tensor:
    """Added up over the ranks that `like` is sharded over."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if place.is_shard() else Replicate() for place in like.placements]
    return DTensor.from_local(part, like.device_mesh, partial).full_tensor()


def norm_over_shards(norm: Tensor, like: Tensor) -> Tensor:
    """The norm of the whole from that of the local shard; `like` is a tensor sharded alike."""
    return _over_shards(norm.square(), like).sqrt() if is_dtensor(like) else norm


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor (a collective call: all ranks make it); other tensors as they are."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def reset_rows(shard: DTensor, reset: Tensor) -> None:
    """Zero those elements of a threshold, sharded along dimension 0, where the whole `reset` is."""
    from torch.distributed.tensor import distribute_tensor

    # All ranks have the same `reset`: each cuts its own part out.
    own = distribute_tensor(reset, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.to_local().masked_fill_(own.to_local(), 0)
