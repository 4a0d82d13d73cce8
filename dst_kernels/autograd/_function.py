"""Hold what all autograd functions share: the base class, a first derivative only, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..ops import one_by_one
from ..ops.autocast import autocast_enabled, device_type_of
from ..ops.checks import check_same_dtype


class MaskedFunction(Function):
    """Build forward and backward from a subclass's `compute`, `save` and `gradients`.

    Their arguments are `compute(*inputs)`, `save(ctx, inputs, output)`, `gradients(ctx, *grads)`.
    torch offers that split too, but then binds the arguments to forward's signature at every call,
    which costs as much as a small layer. Only torch.func and forward-mode AD need it, and get it
    from a twin class. That class also has `jvp` and `vmap`, which torch.compile does not accept.
    """

    compute: ClassVar[Callable[..., Any]]
    save: ClassVar[Callable[..., None]]
    gradients: ClassVar[Callable[..., Any]]
    twin: ClassVar[type[Function]]

    def __init_subclass__(cls) -> None:
        def forward(ctx, *inputs):
            if not torch.compiler.is_compiling():  # it knows no such method
                ctx.set_materialize_grads(False)  # of the effective threshold, zeros each time
            output = cls.compute(*inputs)
            cls.save(ctx, inputs, output)
            return output

        def vmap(info, in_dims, *inputs):
            return one_by_one(cls.apply, info, in_dims, inputs)

        backward = once_differentiable(cls.gradients)
        # torch looks for both on the class.
        cls.forward, cls.backward = staticmethod(forward), staticmethod(backward)  # type: ignore[method-assign]
        members = {"forward": cls.compute, "setup_context": cls.save, "backward": backward}
        members |= {"jvp": refuse_tangents, "vmap": vmap}
        members = {name: staticmethod(function) for name, function in members.items()}
        cls.twin = type(f"{cls.__name__}ForFunc", (Function,), members)

    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return cls.twin.apply(*args)
        return super().apply(*args)


def is_transformed() -> bool:
    """Return whether a transform of torch.func or forward-mode AD is on, as `apply` asks above."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(ctx, *tangents):
    """Raise RuntimeError in place of a `jvp`: weights have no forward-mode derivative."""
    raise RuntimeError(
        "dst_kernels operations have no forward-mode derivative (torch.func.jvp, jacfwd, "
        "linearize, dual tensors) of weight or threshold: use reverse mode there (torch.func.vjp, "
        "jacrev, grad). One of the input alone works with path='packed'"
    )


class _RefuseSecondDerivative(Function):
    """Pass gradients on unchanged, and raise RuntimeError if they are differentiated again.

    The inputs are the number of gradients, the gradients, and all that they were made from.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "dst_kernels operations can be differentiated once only: the gradient of a threshold "
            "mask is a surrogate, not a derivative, so a second derivative of weight or threshold "
            "(create_graph=True, Hessians) has no meaning. One of the input alone, as in gradient "
            "penalties, works with path='packed'"
        )

    jvp = backward


def once_differentiable(backward):
    """Do as torch's decorator of that name, with an error that says why."""

    @functools.wraps(backward)
    def wrapper(ctx, grad, *others):
        if grad is None and all(each is None for each in others):  # the outputs were not used
            return (None,) * len(ctx.needs_input_grad)
        # Unless create_graph was given, or tangents may be there.
        if not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            return backward(ctx, grad, *others)
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            grads = backward(ctx, grad, *others)
        # Thresholds are saved as effective ones, which lead to no parameter.
        leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
        made_from = grad, *others, *ctx.saved_tensors, *leaves
        return _RefuseSecondDerivative.apply(len(grads), *grads, *made_from)

    return wrapper


def wanted(ctx, first: int, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return `grads` of the inputs from position `first` on, None where none is needed."""
    needed = ctx.needs_input_grad[first : first + len(grads)]
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


_CAST_BY_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)  # it never casts float64


def product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the product: under autocast its dtype, else the input's."""
    dtype = input.dtype
    if torch._C._is_any_autocast_enabled() and dtype in _CAST_BY_AUTOCAST:
        device_type = device_type_of(weight)
        if autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    if dtype is not weight.dtype:
        check_same_dtype(input, weight)
    return dtype


def cast_for_autocast(input: Tensor, weight: Tensor) -> Tensor:
    """Return the input in the product's dtype; the weight is compared in its own dtype."""
    dtype = product_dtype(input, weight)
    return input if input.dtype == dtype else input.to(dtype)
