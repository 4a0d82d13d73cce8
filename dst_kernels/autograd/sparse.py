"""Multiply by a sparse weight that is not trained: the input alone has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function

from .. import ops
from ..reference.conv import Geometry, conv_grad_input
from ..reference.sparse import dense_weight


class _WithGradient(Function):
    """Call `op(input, values, columns, row_starts, bias, *rest)`.

    `rest` is the kernel's size and the geometry of a convolution, and the backend. The gradient of
    the input is made by torch, with the dense weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: OpOverload, row_shape: Sequence[int], *args: Any) -> Tensor:
        return ops.call(op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.row_shape, input, values, columns, row_starts, _bias, *rest = inputs
        ctx.geometry = Geometry(*rest[1:-1]) if rest[:-1] else None
        ctx.input_shape, ctx.needless = input.shape, len(inputs) - 3
        ctx.save_for_backward(values, columns, row_starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, columns, row_starts = ctx.saved_tensors
        weight = dense_weight(values, columns, row_starts, ctx.row_shape)
        if ctx.geometry is None:
            grad_input = grad @ weight
        else:
            grad_input = conv_grad_input(
                grad, grad.new_empty(ctx.input_shape), weight, ctx.geometry
            )
        return None, None, grad_input, *(None,) * ctx.needless


def sparse_product(op: OpOverload, row_shape: Sequence[int], *args: Any) -> Tensor:
    """Return `op(*args)`, differentiable with respect to the input, the first of `args`.

    `row_shape`: the weight's shape without its rows.
    """
    if args[0].requires_grad and torch.is_grad_enabled():
        return _WithGradient.apply(op, row_shape, *args)
    return ops.call(op, *args)
