"""Apply a fixed mask to a weight: by torch's own operations, which all its transforms support.

In training on CPUs, products where few weights are kept compute with these alone, forward and
backward: a node takes them out of the weight, another one multiplies by them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .. import reference
from ..backends import implementation, serving
from ..ops import is_batched, is_watched
from ..ops.dtensor import is_dtensor
from ..reference.kept import KeptPlaces, KeptRows
from ._function import is_transformed
from .kept import MOST, forward_by, grad_input_by, most_kept_of, never_kept, of_kept, run_op
from .options import MaskOptions
from .weight import Packed, WeightSource

if TYPE_CHECKING:
    from .product import Product


class _WithDenseGradient(Function):
    """Mask the weight, but pass it the gradient of the result unmasked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fixed_weight(weight: Tensor, mask: Tensor, dense_gradient: bool) -> Tensor:
    """Return `weight` where the boolean `mask` is True, else 0, even where the weight is NaN.

    The weight's gradient is 0 where the mask is False; with `dense_gradient` it is the result's.
    """
    if dense_gradient:
        return _WithDenseGradient.apply(weight, mask)
    return torch.where(mask, weight, 0)


class FixedMask:
    """Hold a fixed mask as one version of a tensor, and where it keeps weights.

    Its `recall`, as a `WeightSource` has it, masks the weight. `receiver` is the parameter whose
    optimizer takes a gradient of the kept weights alone, a sparse COO tensor, or None. What such an
    optimizer's step writes is kept here too, so that it need not be read again.
    """

    __slots__ = (
        "_indices", "_read", "_state", "_write", "_written",
        "dense", "mask", "receiver", "source", "where",
    )  # fmt: skip

    def __init__(self, mask: Tensor, backend: str) -> None:
        self.mask, self._state = mask, _state(mask)
        # Looked up once: each time takes as long as these do for a small layer.
        self._read, self._write, self.dense, places = (
            implementation(backend, mask.device, op)
            for op in ("kept_values", "kept_write_", "kept_dense", "kept_places")
        )
        self.where: KeptPlaces = places(mask)
        self.source = WeightSource(self.recall, fixed=self)
        self.receiver: Tensor | None = None
        self._indices: Tensor | None = None
        self._written: dict[int, tuple[Tensor, int, Tensor]] = {}

    def is_of(self, mask: Tensor) -> bool:
        """Return whether the mask is this one, unchanged, as far as PyTorch records it."""
        return mask is self.mask and _state(mask) == self._state

    def recall(
        self, weight: Tensor, threshold: Tensor, options: MaskOptions, dtype: torch.dtype
    ) -> Packed:
        """Return the weight under the mask, with gradients."""
        return Packed(fixed_weight(weight, self.mask, False).to(dtype), threshold)

    @property
    def indices(self) -> Tensor:
        """Return those of a sparse COO tensor of the kept weights: int64 [dimensions, kept]."""
        if self._indices is None:
            self._indices = torch.stack(torch.unravel_index(self.where.flat(), self.mask.shape))
        return self._indices

    def has(self, indices: Tensor) -> bool:
        """Return whether a sparse COO tensor has values for the kept weights, in their order."""
        mine = self.indices
        return indices.data_ptr() == mine.data_ptr() or torch.equal(indices, mine)

    def values(self, which: int, dense: Tensor) -> Tensor:
        """Return the kept elements of a tensor, not to be written to.

        `which`: 0 for the weight, otherwise a number of its own for each tensor of its shape.
        """
        written, version, values = self._written.get(which, (None, 0, None))
        if (
            written is not None
            and values is not None
            and written.data_ptr() == dense.data_ptr()
            and version == dense._version
        ):
            return values
        return self._read(dense.detach(), self.where)

    def write(self, which: int, dense: Tensor, values: Tensor) -> None:
        """Write kept elements into a tensor, whose version has been increased, and keep them."""
        dense = dense.detach()
        self._write(dense, values, self.where)
        self._written[which] = dense, dense._version, values

    def forget(self) -> None:
        """Read everything again: something was written in a way that PyTorch does not record."""
        self._written.clear()

    def serves(
        self,
        product: type[Product],
        input: Tensor,
        weight: Tensor,
        geometry: tuple,
        options: MaskOptions,
    ) -> bool:
        """Return whether this product is one with kept weights alone."""
        return (
            bool(product.kept_grad_weight)
            and weight.dtype is input.dtype
            and self.where.kept <= most_kept_of(product, input, weight, geometry, options, True)
        )


def _state(mask: Tensor) -> tuple[int, int]:
    return mask._version, mask.data_ptr()


def may_keep_rows(weight: Tensor, mask: Tensor, options: MaskOptions) -> bool:
    """Return whether a product with a weight under a fixed mask might be one with kept rows."""
    return (
        not never_kept(weight, options)
        and (options.path == "sparse" or _auto_may(weight, options))
        and weight.is_contiguous()
        and weight.numel() <= MOST
        and not (is_watched() or is_transformed() or mask.is_inference() or is_dtensor(weight))
    )


def _auto_may(weight: Tensor, options: MaskOptions) -> bool:
    return (
        options.path == "auto"
        and torch.is_grad_enabled()
        and "cpu" in serving(options.backend, weight.device)
    )


class _Values(Function):
    """Return the kept weights, [kept]."""

    @staticmethod
    def forward(ctx, weight, fixed):
        ctx.fixed, ctx.shape = fixed, weight.shape
        ctx.sparse = weight is fixed.receiver and _passes_as_it_is(weight)
        ctx.save_for_backward(fixed.mask)  # autograd checks that it is still the same
        return fixed.values(0, weight).detach()  # a new tensor, since autograd changes what it gets

    @staticmethod
    def backward(ctx, grad) -> Any:
        ctx.saved_tensors  # noqa: B018 - the check
        fixed, shape = ctx.fixed, ctx.shape
        if torch.is_grad_enabled() or is_batched(grad):
            return reference.kept_dense(grad, fixed.where, shape), None
        if ctx.sparse and _accumulates(ctx.next_functions[0][0]):
            sparse = torch.sparse_coo_tensor(
                fixed.indices, grad, shape, check_invariants=False, is_coalesced=True
            )
            return sparse, None
        return fixed.dense(grad, fixed.where, shape), None


def _passes_as_it_is(weight: Tensor) -> bool:
    """Return whether nothing that expects a dense gradient sees that of a weight.

    That is hooks, DistributedDataParallel (which a checkpoint that backward runs again may be part
    of), and torch's norms where they know no sparse tensors.
    """
    return (
        not weight._backward_hooks
        and not getattr(weight, "_post_accumulate_grad_hooks", None)
        and nn.parallel.DistributedDataParallel._active_ddp_module is None
        and torch._C._current_graph_task_id() == -1
        and _norms_of_sparse_tensors()
    )


@functools.cache
def _norms_of_sparse_tensors() -> bool:
    try:
        torch.linalg.vector_norm(torch.eye(1, device="cpu").to_sparse())
    except NotImplementedError:  # in older versions of torch
        return False
    return True


def _accumulates(node: Any) -> bool:
    """Return whether this backward adds to the `.grad` of a leaf; `autograd.grad` returns it."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


class _ProductWithValues(Function):
    @staticmethod
    def forward(ctx, input, values, bias, where, shape, product, geometry, backend):
        ctx.set_materialize_grads(False)
        ctx.how = where, shape, product, geometry, backend, None if bias is None else bias.dtype
        ctx.save_for_backward(input, values)
        rows = KeptRows(values, where.columns, where.places)
        return forward_by(rows, backend, product, input, shape, bias, geometry)

    @staticmethod
    def backward(ctx, grad) -> Any:
        if grad is None:
            return (None,) * 8
        input, values = ctx.saved_tensors
        where, shape, product, geometry, backend, bias_dtype = ctx.how
        of_input, of_values, of_bias, *_ = ctx.needs_input_grad
        grad_input = grad_values = grad_bias = None
        if torch.is_grad_enabled() or is_batched(grad):
            # torch's products can be differentiated again, and take many gradients at a time.
            masked = reference.kept_dense(values, where, shape)
            if of_values:
                dense = product.dense_gradient(grad, input, masked, *geometry)
                grad_values = reference.kept_values(dense, where)
            if of_input:
                grad_input = product.grad_input(grad, input, masked, *geometry)
        else:
            if of_values:
                op, how = product.kept_grad_weight, of_kept(shape, geometry)
                grad_values = run_op(backend, op, grad, input, where, *how)
            if of_input:
                rows = KeptRows(values, where.columns, where.places)
                operands = grad, input, shape, geometry
                grad_input = grad_input_by(rows, backend, product, *operands)
        if of_bias:
            grad_bias = product.grad_bias(grad, bias_dtype)
        return grad_input, grad_values, grad_bias, None, None, None, None, None


def fixed_product(
    product: type[Product],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    fixed: FixedMask,
    backend: str,
) -> Tensor:
    """Return the product with the weights that a mask keeps, with gradients to these alone."""
    values = _Values.apply(weight, fixed)
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    how = fixed.where, weight.shape, product, geometry, backend
    return _ProductWithValues.apply(input, values, bias, *how)
