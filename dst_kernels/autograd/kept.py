"""Multiply by W * M in training on CPUs: by its kept elements alone, by oneDNN, or as torch does.

W * M is the same node as on the packed path, and its gradient is the dense G: whether a product
reads all of W * M or its kept elements, and by which library, is a choice of each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import implementation, serving
from ..ops import is_batched, is_watched, without_autograd_and_autocast
from ..plan import most_kept
from ..reference.kept import KeptRows, dense_rows, new_kept_rows
from ..reference.linear import flatten_batch
from ..reference.weight import threshold_mask
from . import onednn
from ._function import is_transformed
from .options import MaskOptions

if TYPE_CHECKING:
    from .product import Product

_SPARSE_DTYPES = (torch.float32, torch.bfloat16)
_LEAST = 1 << 13  # elements of a weight for which the choice is worth its time
MOST = (1 << 31) - 1  # elements that places can say
_LONGEST = 1 << 15  # elements of a row that a step writes as a kept one: threads share longer rows
_FEW = 0.5  # of the weights: where more are kept, the planner's answer is no


class _Product(Function):
    """Multiply by kept rows, or, where these are None, by oneDNN."""

    @staticmethod
    def forward(ctx, input, masked, bias, rows, product, geometry, backend, memory):
        ctx.set_materialize_grads(False)
        ctx.how = product, geometry, backend, None if bias is None else bias.dtype
        # Whatever writes the rows anew also writes `masked`, whose version autograd checks.
        ctx.rows, ctx.memory = rows, memory
        ctx.save_for_backward(input, masked)
        if rows is None:
            return onednn.linear(input, masked, bias)
        return forward_by(rows, backend, product, input, masked.shape, bias, geometry)

    @staticmethod
    def backward(ctx, grad) -> Any:
        if grad is None:
            return (None,) * 8
        input, masked = ctx.saved_tensors
        product, geometry, backend, bias_dtype = ctx.how
        of_input, of_masked, of_bias, *_ = ctx.needs_input_grad
        grad_input = grad_masked = grad_bias = None
        # torch's products can be differentiated again, and take many gradients at a time.
        by_torch = torch.is_grad_enabled() or is_batched(grad)
        if of_masked:  # first: an optimizer's hook may free it before the input's is made
            if by_torch or geometry or not onednn.outruns_blas(input, masked):
                grad_masked = product.dense_gradient(grad, input, masked, *geometry)
            else:
                operands = flatten_batch(grad), flatten_batch(input)
                grad_masked = onednn.weight_gradient(*operands, ctx.memory)
        if of_input and by_torch:
            dense = masked if ctx.rows is None else _Dense.apply(masked, ctx.rows)
            grad_input = product.grad_input(grad, input, dense, *geometry)
        elif of_input and ctx.rows is None:
            grad_input = onednn.linear(grad, masked.t())
        elif of_input:
            grad_input = grad_input_by(
                ctx.rows, backend, product, grad, input, masked.shape, geometry
            )
        if of_bias:
            grad_bias = product.grad_bias(grad, bias_dtype)
        return grad_input, grad_masked, grad_bias, None, None, None, None, None


def run_op(backend: str, op: str, tensor: Tensor, *args: Any) -> Any:
    """Run an op on tensors whose dtypes are decided."""
    run = implementation(backend, tensor.device, op)
    if not torch._C._is_any_autocast_enabled():
        return run(tensor, *args)
    with without_autograd_and_autocast(tensor.device.type):
        return run(tensor, *args)


def of_kept(shape: Sequence[int], geometry: tuple) -> tuple:
    """Return what ops of kept elements take for the geometry, with a weight of this shape."""
    return (shape[2:], *geometry) if geometry else ()


def forward_by(
    rows: KeptRows,
    backend: str,
    product: type[Product],
    input: Tensor,
    shape: Sequence[int],
    bias: Tensor | None,
    geometry: tuple,
) -> Tensor:
    """Return the product by kept rows of a weight of this shape, for the forward of a node."""
    how = of_kept(shape, geometry)
    output = run_op(backend, product.kept_forward, input, rows, bias, *how)
    # Autograd must not see a view here, so that callers may overwrite the result (`relu_`).
    return output.clone() if output._is_view() else output


def grad_input_by(
    rows: KeptRows,
    backend: str,
    product: type[Product],
    grad: Tensor,
    like: Tensor,
    shape: Sequence[int],
    geometry: tuple,
) -> Tensor:
    """Return dX, shaped like the input `like`, by kept rows of a weight of this shape."""
    how = (like, rows, *of_kept(shape, geometry)) if geometry else (rows,)
    return run_op(backend, product.kept_grad_input, grad, *how)


class MaskedWeightInMemory:
    """Hold W * M that an optimizer's step renews, and how: dense, or as kept rows.

    `tensor` has the weight's shape. It is W * M itself, or, where `rows` is not None, the values of
    these.
    """

    __slots__ = ("_by_rows", "_made_from", "_number", "_spare", "gradient", "rows", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.rows: KeptRows | None = None
        self.gradient = onednn.GradientMemory()
        self._by_rows = False  # whether the last product took kept rows
        self._number: int | None = None  # of kept weights, if it is known
        self._made_from: tuple[Tensor, Tensor] | None = None  # weight and effective threshold
        self._spare: tuple[Tensor, Tensor] | None = None

    def made_by_forward(self, masked: Tensor, weight: Tensor, effective: Tensor) -> None:
        """Keep a dense W * M, in the memory of the one before."""
        if masked is not self.tensor:
            self.tensor.copy_(masked)
        self.rows = self._number = None
        self._made_from = weight.detach(), effective

    def made_by_step(self, number: int | None, targets: tuple[Tensor, Tensor] | None) -> None:
        """Take note of what a step has written, and where: what `targets` returned.

        `number`: of kept weights, None if the host cannot know it without waiting.
        """
        self.rows = None if targets is None else KeptRows(self.tensor, *targets)
        self._number, self._made_from = number, None

    def keeps_at_most(self, number: float) -> bool:
        """Return whether there are so few kept weights, as far as the host can know."""
        if self._number is None and self._made_from is not None:
            self._number = int(threshold_mask(*self._made_from).sum())
        return self._number is not None and self._number <= number

    def dense(self, masked: Tensor) -> Tensor:
        """Return W * M itself, with the gradients of `masked`, which shares this memory."""
        self._by_rows = False
        return masked if self.rows is None else _Dense.apply(masked, self.rows)

    def kept_rows(self, backend: str) -> KeptRows:
        """Return the kept rows, made from W * M if the step has not written them."""
        self._by_rows = True
        if self.rows is not None:
            return self.rows
        rows = run_op(backend, "kept_rows", self.tensor, self.tensor.numel())
        self._spare = rows[1:]
        return rows

    def targets(self, may_skip: bool) -> tuple[Tensor, Tensor] | None:
        """Return columns and places for the next step to write kept rows; None: W * M itself.

        A step that may be skipped writes what is there already.
        """
        if may_skip:
            return None if self.rows is None else self.rows[1:]
        tensor = self.tensor
        size = tensor.numel()
        if not (self._by_rows and tensor.is_cpu and size <= MOST):
            return None
        if size > _LONGEST * len(tensor):
            return None
        if self._spare is None:
            self._spare = new_kept_rows(tensor)[1:]
        return self._spare


class _Dense(Function):
    """Return W * M from its kept rows; the gradient is G either way."""

    @staticmethod
    def forward(ctx, masked, rows):
        return dense_rows(rows)

    @staticmethod
    def backward(ctx, grad) -> Any:
        return grad, None


def never_kept(masked: Tensor, options: MaskOptions) -> bool:
    """Return whether torch multiplies whatever else is known: found out in no time."""
    return (
        torch.compiler.is_compiling()
        or (path := options.path) == "packed"
        or (
            not (masked.numel() >= _LEAST and masked.is_cpu and masked.requires_grad)
            and path == "auto"
        )
    )


def multiply(
    product: type[Product],
    input: Tensor,
    masked: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    options: MaskOptions,
    known: MaskedWeightInMemory | None = None,
) -> Tensor:
    """Return the product with `masked`, W * M in the input's dtype, by torch or by kept rows.

    On the path "auto" it is by kept rows in training on CPUs where the planner says that they are
    short enough, on "sparse" always. Tracers, torch.func and tools that watch every operation see
    torch's own product. `known`: what is known of `masked` if an optimizer's step made it.
    """
    rows: KeptRows | None = None
    auto = options.path == "auto"
    if not never_kept(masked, options) and not (
        auto and known is not None and not known.keeps_at_most(_FEW * masked.numel())
    ):
        most = most_kept_of(product, input, masked, geometry, options, known is not None)
        if known is None and most:
            rows = run_op(options.backend, "kept_rows", masked.detach(), most)
        elif known is not None and most and (not auto or known.keeps_at_most(most)):
            rows = known.kept_rows(options.backend)
    if rows is None:
        if known is not None:
            masked = known.dense(masked)
        if (
            geometry
            or not onednn.outruns_blas(input, masked, bias)
            or not masked.requires_grad
            or is_watched()
            or is_transformed()
        ):
            return product.multiply(input, masked, bias, *geometry)
    elif input.dtype is not masked.dtype:  # torch's product would do it, under autocast
        input = input.to(masked.dtype)
    memory = None if known is None else known.gradient
    how = rows, product, geometry, options.backend, memory
    return _Product.apply(input, masked, bias, *how)


def most_kept_of(
    product: type[Product],
    input: Tensor,
    masked: Tensor,
    geometry: tuple,
    options: MaskOptions,
    made: bool,
) -> int:
    """Return how many weights may be kept for a product by kept rows; 0: torch multiplies.

    `made`: the rows need not be taken from W * M.
    """
    if (
        not product.kept_forward
        or not masked.is_contiguous()
        or masked.dim() > 4
        or is_watched()
        or is_transformed()
    ):
        return 0
    if options.path == "sparse":
        return masked.numel()
    if masked.dtype not in _SPARSE_DTYPES or input.numel() == 0:
        return 0
    if "cpu" not in serving(options.backend, masked.device):  # the table is of its kernels
        return 0
    return most_kept(*product.sizes(input, masked, *geometry), masked.dtype, made)
