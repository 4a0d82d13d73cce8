"""Define every op: its schema, its fake, and how it reaches a backend.

The ops are opaque to torch.compile and know nothing of autograd (`autograd` wraps them).
Ops with a `reset_ratio` take the stored threshold and also return the effective one; all others
take the effective one. Arguments are checked here, with the same messages whether the tensors are
real or fake, but not in a `call`. Outputs have the strides their fake says: masked weights and
weight gradients those of the weight, activations contiguous or channels last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends import implementation
from ..reference.conv import Geometry, conv_memory_format
from ..reference.weight import recorded_masked_weight
from . import checks, conv_checks, sparse_checks
from .autocast import autocast_enabled, device_type_of
from .batching import is_batched, one_by_one

NAMESPACE = "dst_kernels"
_run: dict[int, Callable] = {}  # by id: an overload's own hash is another call
_library = torch.library.Library(NAMESPACE, "DEF")

# By names of this module: each forward asks.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_torch_func_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def _define(schema: str, check: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define an op from its decorated fake; return its overload, to save calls the look-up.

    Every schema gets a last argument `backend`; the function of the op's name in that backend
    takes all the others, as do `check` and the fake: those of a convolution as one `Geometry`.
    """
    name, _, arguments = schema.partition("(")
    before, _, rest = arguments.partition("SymInt[] stride")
    start = before.count(",")
    schema = f"{name}({arguments.replace(') ->', ', str backend) ->', 1)}"

    def bind(fake: Callable) -> torch._ops.OpOverload:
        def prepared(args, unchecked):
            *args, backend = args
            if rest:
                args[start : start + 4] = [Geometry(*args[start : start + 4])]
            if unchecked:
                check(*args)
            double = not args[0].is_cpu and _any_double(args)
            return implementation(backend, args[0].device, name, double=double), args

        def run(*args, unchecked=True):
            kernel, args = prepared(args, unchecked)
            if not (torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()):
                return kernel(*args)
            with without_autograd_and_autocast(device_type_of(args[0])):
                return kernel(*args)

        def run_fake(*args):
            return fake(*prepared(args, unchecked=True)[-1])

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", run_fake, lib=_library)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default

        def run_batched(info, in_dims, *args):
            return one_by_one(overload, info, in_dims, args)

        torch.library.register_vmap(f"{NAMESPACE}::{name}", run_batched, lib=_library)
        _run[id(overload)] = run
        return overload

    return bind


def _any_double(args: list) -> bool:
    """Return whether float64 is among the dtypes; GPU kernels do not take it."""
    return any(getattr(argument, "dtype", argument) is torch.float64 for argument in args)


class without_autograd_and_autocast:
    """Switch autograd and autocast off: gradients and dtypes are decided outside the ops.

    torch's own context managers do the same and cost as much as a launch.
    """

    __slots__ = ("autocast", "device_type", "grad")

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = torch._C._is_any_autocast_enabled() and autocast_enabled(self.device_type)
        if self.grad:
            torch._C._set_grad_enabled(False)
        if self.autocast:
            torch.set_autocast_enabled(self.device_type, False)

    def __exit__(self, *_) -> None:
        if self.grad:
            torch._C._set_grad_enabled(True)
        if self.autocast:
            torch.set_autocast_enabled(self.device_type, True)


def call(op: torch._ops.OpOverload, *args):
    """Return `op(*args)` for checked arguments, without the dispatcher unless something watches.

    On a CPU the way through the dispatcher and back costs as much as a small layer.
    """
    if is_watched() or type(args[0]) not in (Tensor, Parameter):
        if op is masked_weight and is_exporting():  # a file may name torch's operations only
            return recorded_masked_weight(*args[:-1])
        return op(*args)
    try:
        return _run[id(op)](*args, unchecked=False)
    except RuntimeError:
        if not is_batched(args[0]):  # in a backward, the first argument is the gradient
            raise
    return op(*args)


def can_commit(weight: Tensor, threshold: Tensor) -> bool:
    """Return whether `commit_masked_weight` takes them.

    A registered op writes to none of its arguments, so nothing may watch.
    """
    return (
        type(weight) in (Tensor, Parameter)
        and type(threshold) in (Tensor, Parameter)
        and not (is_watched() or threshold.is_inference())
    )


def commit_masked_weight(
    weight: Tensor, threshold: Tensor, reset_ratio: float | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Return what `masked_weight` does, and write a reset by the guard into `threshold` too."""
    arguments = weight, threshold, reset_ratio, dtype, True, backend
    made = _run[id(masked_weight)](*arguments, unchecked=False)
    torch.autograd.graph.increment_version(threshold)
    return made


def is_exporting() -> bool:
    """Return `torch.compiler.is_exporting()`, which older compilers take for True when they run."""
    return torch.compiler._is_exporting_flag


def is_watched() -> bool:
    """Return whether a compiler, a tracer, a dispatch mode or torch.func sees the ops that run.

    If so, all ops must have a fake and go through the dispatcher.
    """
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or _torch_func_is_active()
        or _tracing_state() is not None
    )


@_define(
    "effective_threshold(Tensor weight, Tensor threshold, float? reset_ratio) -> Tensor",
    checks.check_effective_threshold,
)
def effective_threshold(weight, threshold, reset_ratio):
    return torch.empty_like(threshold)


@_define(
    "masked_weight(Tensor weight, Tensor threshold, float? reset_ratio, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    checks.check_masked_weight,
)
def masked_weight(weight, threshold, reset_ratio, dtype):
    return torch.empty_like(weight, dtype=dtype), torch.empty_like(threshold)


@_define(
    "masked_weight_backward(Tensor grad, Tensor weight, Tensor threshold, str surrogate, "
    "bool structure_gradient) -> (Tensor, Tensor)",
    checks.check_masked_weight_backward,
)
def masked_weight_backward(grad, weight, threshold, surrogate, structure_gradient):
    return torch.empty_like(weight), torch.empty_like(threshold)


@_define(
    "masked_linear(Tensor input, Tensor weight, Tensor threshold, Tensor? bias, "
    "float? reset_ratio) -> (Tensor, Tensor)",
    checks.check_masked_linear,
)
def masked_linear(input, weight, threshold, bias, reset_ratio):
    output = input.new_empty([*input.shape[:-1], weight.shape[0]])
    return output, torch.empty_like(threshold)


@_define(
    "masked_linear_grad_input(Tensor grad, Tensor weight, Tensor threshold) -> Tensor",
    checks.check_linear_grad_input,
)
def masked_linear_grad_input(grad, weight, threshold):
    return grad.new_empty([*grad.shape[:-1], weight.shape[1]])


@_define(
    "masked_linear_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor threshold, "
    "str surrogate, bool structure_gradient) -> (Tensor, Tensor)",
    checks.check_linear_grad_weight,
)
def masked_linear_grad_weight(grad, input, weight, threshold, surrogate, structure_gradient):
    return torch.empty_like(weight), torch.empty_like(threshold)


@_define(
    "masked_conv(Tensor input, Tensor weight, Tensor threshold, Tensor? bias, float? reset_ratio, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> (Tensor, Tensor)",
    conv_checks.check_masked_conv,
)
def masked_conv(input, weight, threshold, bias, reset_ratio, geometry):
    output = torch.empty(
        geometry.output_shape(input.shape, weight.shape),
        dtype=input.dtype,
        device=input.device,
        memory_format=conv_memory_format(input, weight),
    )
    return output, torch.empty_like(threshold)


@_define(
    "masked_conv_grad_input(Tensor grad, SymInt[] input_shape, Tensor weight, Tensor threshold, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    conv_checks.check_conv_grad_input,
)
def masked_conv_grad_input(grad, input_shape, weight, threshold, geometry):
    return torch.empty(
        input_shape,
        dtype=grad.dtype,
        device=grad.device,
        memory_format=conv_memory_format(grad, weight),
    )


@_define(
    "masked_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor threshold, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str surrogate, "
    "bool structure_gradient) -> (Tensor, Tensor)",
    conv_checks.check_conv_grad_weight,
)
def masked_conv_grad_weight(
    grad, input, weight, threshold, geometry, surrogate, structure_gradient
):
    return torch.empty_like(weight), torch.empty_like(threshold)


@_define(
    "sparse_linear(Tensor input, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias) "
    "-> Tensor",
    sparse_checks.check_sparse_linear,
)
def sparse_linear(input, values, columns, row_starts, bias):
    return input.new_empty([*input.shape[:-1], row_starts.shape[0] - 1])


@_define(
    "sparse_conv(Tensor input, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias, "
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) "
    "-> Tensor",
    sparse_checks.check_sparse_conv,
)
def sparse_conv(input, values, columns, row_starts, bias, kernel_size, geometry):
    weight_shape = [row_starts.shape[0] - 1, 0, *kernel_size]
    return torch.empty(
        geometry.output_shape(input.shape, weight_shape),
        dtype=input.dtype,
        device=input.device,
        memory_format=conv_memory_format(input, input),
    )
