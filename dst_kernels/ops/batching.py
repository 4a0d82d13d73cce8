"""Call an op once for each member of a batch of weights or gradients, which no kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def one_by_one(function: Callable, info: Any, in_dims: Sequence, args: Sequence) -> tuple[Any, Any]:
    """Return (outputs, their batch dimensions), as a rule of `torch.library.register_vmap` must.

    `function(*args)` returns a tensor or several; `in_dims` says where the batch dimension of each
    of `args` lies, if it has one.
    """

    size = info.batch_size

    def member(index: int) -> list:
        return [
            # An empty batch: zeros give the outputs their shape.
            (arg.select(dim, index) if size else arg.sum(dim))
            if isinstance(arg, Tensor) and dim is not None
            else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    outputs = [function(*member(index)) for index in range(max(size, 1))]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs)[:size], 0
    stacked = [torch.stack(each)[:size] for each in zip(*outputs, strict=True)]
    return tuple(stacked), (0,) * len(stacked)


def is_batched(tensor: Tensor) -> bool:
    """Return whether `tensor` is a batch made by `torch.autograd.grad(is_grads_batched=True)`.

    That is an older vmap than torch.func's: torch's dispatcher calls the op for each member.
    """
    return torch._C._functorch.is_legacy_batchedtensor(tensor)
