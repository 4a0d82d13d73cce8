"""Apply a fixed mask to a weight: by torch's own operations, which all its transforms support.

In training on CPUs, products where few weights are kept compute with these alone, forward and
backward: a node takes them out of the weight, another one multiplies by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..backends import implementation
from ..ops import is_batched, is_watched
from ..ops.dtensor import is_dtensor
from ..reference.kept import KeptPlaces, KeptRows
from ._function import is_transformed
from .kept import LEAST, MOST, most_kept_of
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

    Its `recall`, as a `WeightSource` has it, masks the weight.
    """

    __slots__ = ("_state", "mask", "source", "where")

    def __init__(self, mask: Tensor, backend: str) -> None:
        self.mask, self._state = mask, _state(mask)
        self.where: KeptPlaces = implementation(backend, mask.device, "kept_places")(mask)
        self.source = WeightSource(self.recall, fixed=self)

    def is_of(self, mask: Tensor) -> bool:
        """Return whether the mask is this one, unchanged, as far as PyTorch records it."""
        return mask is self.mask and _state(mask) == self._state

    def recall(
        self, weight: Tensor, threshold: Tensor, options: MaskOptions, dtype: torch.dtype
    ) -> Packed:
        """Return the weight under the mask, with gradients."""
        return Packed(fixed_weight(weight, self.mask, False).to(dtype), threshold)

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
            and self.where.kept <= most_kept_of(product, input, weight, geometry, options.path)
        )


def _state(mask: Tensor) -> tuple[int, int]:
    return mask._version, mask.data_ptr()


def may_keep_rows(weight: Tensor, mask: Tensor, path: str) -> bool:
    """Return whether a product with a weight under a fixed mask might be one with kept rows."""
    return (
        path in ("auto", "sparse")
        and not torch.compiler.is_compiling()
        and weight.is_contiguous()
        and weight.numel() <= MOST
        and not (is_watched() or is_transformed() or mask.is_inference() or is_dtensor(weight))
        and (
            path == "sparse"
            or (
                weight.numel() >= LEAST
                and weight.is_cpu
                and weight.requires_grad
                and torch.is_grad_enabled()
            )
        )
    )


class _Values(Function):
    """Return the kept weights, [kept]."""

    @staticmethod
    def forward(ctx, weight, fixed, backend):
        ctx.how = fixed.where, backend, weight.shape
        ctx.save_for_backward(fixed.mask)  # autograd checks that it is still the same
        return implementation(backend, weight.device, "kept_values")(weight, fixed.where)

    @staticmethod
    def backward(ctx, grad) -> Any:
        where, backend, shape = ctx.how
        ctx.saved_tensors  # noqa: B018 - the check
        if torch.is_grad_enabled() or is_batched(grad):
            return reference.kept_dense(grad, where, shape), None, None
        run = implementation(backend, grad.device, "kept_dense")
        return run(grad, where, shape), None, None


class _ProductWithValues(Function):
    @staticmethod
    def forward(ctx, input, values, bias, where, shape, product, geometry, backend):
        ctx.set_materialize_grads(False)
        ctx.how = where, shape, product, geometry, backend, None if bias is None else bias.dtype
        ctx.save_for_backward(input, values)
        rows = KeptRows(values, where.columns, where.places)
        return implementation(backend, input.device, product.kept_forward)(
            input, rows, bias, *geometry
        )

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
                run = implementation(backend, grad.device, product.kept_grad_weight)
                grad_values = run(grad, input, where, *geometry)
            if of_input:
                run = implementation(backend, grad.device, product.kept_grad_input)
                rows = KeptRows(values, where.columns, where.places)
                grad_input = run(grad, rows, *geometry)
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
    values = _Values.apply(weight, fixed, backend)
    how = fixed.where, weight.shape, product, geometry, backend
    return _ProductWithValues.apply(input, values, bias, *how)
