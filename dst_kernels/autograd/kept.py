"""Multiply by a masked weight through its kept elements alone, forward and for dX.

W * M is the same node as on the packed path, and its gradient is the dense G: whether a product
reads all of W * M or its kept elements is a choice of each call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import implementation
from ..ops import is_batched, is_watched, without_autograd_and_autocast
from ..plan import most_kept
from ..reference.kept import KeptRows
from ._function import is_transformed

if TYPE_CHECKING:
    from .product import Product

_SPARSE_DTYPES = (torch.float32, torch.bfloat16)
_LEAST = 1 << 13  # elements of a weight for which the choice is worth its time


class _KeptProduct(Function):
    @staticmethod
    def forward(ctx, input, masked, bias, rows, product, geometry, backend):
        ctx.set_materialize_grads(False)
        ctx.how = product, geometry, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, masked, *rows)
        run = implementation(backend, input.device, product.kept_forward)
        with without_autograd_and_autocast(input.device.type):
            return run(input, rows, bias, *geometry)

    @staticmethod
    def backward(ctx, grad) -> Any:
        if grad is None:
            return (None,) * 7
        input, masked, *parts = ctx.saved_tensors
        product, geometry, backend = ctx.how
        of_input, of_masked, of_bias, *_ = ctx.needs_input_grad
        grad_input = grad_masked = grad_bias = None
        if of_masked:  # first: an optimizer's hook may free it before the input's is made
            grad_masked = product.dense_gradient(grad, input, masked, *geometry)
        if of_input and (torch.is_grad_enabled() or is_batched(grad)):
            # torch's product can be differentiated again, and takes many gradients at a time.
            grad_input = product.grad_input(grad, input, masked, *geometry)
        elif of_input:
            run = implementation(backend, grad.device, product.kept_grad_input)
            like = (input,) if geometry else ()
            grad_input = run(grad, *like, KeptRows(*parts), *geometry)
        if of_bias:
            grad_bias = product.grad_bias(grad, ctx.bias_dtype)
        return grad_input, grad_masked, grad_bias, None, None, None, None


def multiply(
    product: type[Product],
    input: Tensor,
    masked: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    path: str,
    backend: str,
) -> Tensor:
    """Return the product with `masked`, W * M in the input's dtype, by torch or by kept elements.

    On the path "auto" it is by kept elements in training on CPUs where the planner says that they
    are few enough, on "sparse" always. Tracers, torch.func and tools that watch every operation see
    torch's own product.
    """
    if (
        path == "packed"
        or torch.compiler.is_compiling()
        or (
            path == "auto"
            and not (
                masked.is_cpu
                and masked.requires_grad
                and masked.numel() >= _LEAST
                and masked.dtype in _SPARSE_DTYPES
            )
        )
    ):
        return product.multiply(input, masked, bias, *geometry)
    rows = _rows(product, input, masked, geometry, path, backend)
    if rows is None:
        return product.multiply(input, masked, bias, *geometry)
    return _KeptProduct.apply(input, masked, bias, rows, product, geometry, backend)


def _rows(
    product: type[Product],
    input: Tensor,
    masked: Tensor,
    geometry: tuple,
    path: str,
    backend: str,
) -> KeptRows | None:
    """Return the kept elements of `masked`, or None where torch is to multiply with all of it."""
    if not (product.kept_forward and masked.is_contiguous() and masked.dim() <= 4):
        return None
    if is_transformed() or is_watched() or torch._C._get_tracing_state() is not None:
        return None
    most = masked.numel()
    if path == "auto":
        sizes = product.sizes(input, masked, *geometry)
        most = most_kept(*sizes, masked.dtype) if input.numel() else 0
        if not most:
            return None
    with without_autograd_and_autocast(masked.device.type):
        run = implementation(backend, masked.device, "kept_rows")
        return run(masked.detach(), most)
