"""Counts what a call does on a GPU, without one: kernels, bytes, arithmetic, memory.

The call runs on fake tensors, which have shapes and no data. Every op that writes something is a
kernel that reads its operands and writes its results once.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .machine import (
    ATTENTION,
    CONVOLUTION,
    DEPTHWISE,
    EPILOGUE,
    GRADIENT_PRODUCT,
    TILE,
    TRITON_CONVOLUTION,
    Kernel,
    masked_product,
    total_launches,
)

__all__ = ["Trace", "fake_tensors", "fused", "trace"]

_a_number = torch.ops.aten._local_scalar_dense.default
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Kernels of CUDA that read their operands twice, for statistics or sums first, in two launches.
_TWO_PASSES = (
    "native_batch_norm",
    "native_batch_norm_backward",
    "native_layer_norm_backward",
)
# Ours: how many launches where it is not one. The second settles the guard, or adds up dt.
_LAUNCHES = {
    "masked_weight": 2,
    "masked_linear": 2,
    "masked_conv": 2,
    "masked_linear_grad_weight": 2,
    "masked_conv_grad_weight": 2,
}


@dataclass
class Trace:
    """What a call did.

    Attributes:
        kernels: in order.
        syncs: how often the host waited for a number.
        ops: calls of ours.
        peak: most bytes allocated during the call, beyond those before it.
        saved: bytes kept for a backward, where somebody asked.
    """

    kernels: list[Kernel] = field(default_factory=list)
    syncs: int = 0
    ops: int = 0
    peak: int = 0
    saved: int | None = None

    @property
    def launches(self) -> int:
        return total_launches(self.kernels)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors are fake ones on the CPU, where autocast and autograd work as ever."""
    with FakeTensorMode() as mode:
        # Its memo holds weak references to parameters, and nn.Module.to refuses to swap those.
        mode.fake_tensor_converter.set_tensor_memo = lambda *_: None
        with _NoToEveryQuestion():
            yield


def trace(call: Callable[[], object], tf32: bool = False) -> Trace:
    """Run `call` on fake tensors; `tf32`: how float32 products are rounded."""
    found = Trace()
    with _AutocastOfCuda(), _Counter(found, tf32):
        call()
    return found


class _NoToEveryQuestion(TorchDispatchMode):
    """What asks for a number gets False: no layer has collapsed, no initial weight is too large."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return False if op is _a_number else op(*args, **(kwargs or {}))


class _AutocastOfCuda(TorchFunctionMode):
    """What autocast runs in float32 on CUDA and not on a CPU, as far as our networks use it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.layer_norm, F.cross_entropy) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    def __init__(self, found: Trace, tf32: bool) -> None:
        super().__init__()
        self._found, self._tf32 = found, tf32
        self._allocated = 0
        self._numbers: dict[int, int] = {}  # of storages, by address
        self._next = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is _a_number:
            self._found.syncs += 1
            return op(*args, **kwargs)
        operands = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        result = op(*args, **kwargs)
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        known = {_address(each) for each in operands}
        fresh = [each for each in results if _address(each) not in known]
        for each in fresh:
            self._allocate(each)
        written = fresh + _overwritten(op, args, kwargs)
        name = op._overloadpacket.__name__
        if op.namespace == "prim" or name in _ALLOCATIONS or not written:
            return result
        if op.namespace == "dst_kernels":
            self._found.ops += 1
        read = operands[1:] if name == "copy_" else operands
        for kernel in self._kernels(op, name, args, kwargs, result, read, written):
            self._found.kernels.append(kernel)
        return result

    def _kernels(self, op, name, args, kwargs, result, read, written) -> Iterator[Kernel]:
        flops, dtype, share = _arithmetic(op, name, args, kwargs, result)
        about = Kernel(name, 0, flops, dtype, self._tf32, share, _LAUNCHES.get(name, 1))
        if name.startswith("masked_") and name.endswith(("linear_grad_weight", "conv_grad_weight")):
            whole = self._with_operands(about, read, written)
            yield from _with_its_epilogue(whole, _by_name(op, args, kwargs), self._tf32)
            return
        if name != "convolution_backward":
            yield self._with_operands(about, read, written)
            return
        grad, input, weight = read[:3]
        of_input, of_weight, of_bias = result
        if of_input is not None:
            yield self._with_operands(about, [grad, weight], [of_input])
        if of_weight is not None:
            yield self._with_operands(about, [grad, input], [of_weight])
        if of_bias is not None:
            yield self._with_operands(replace(about, flops=0), [grad], [of_bias])

    def _with_operands(self, kernel: Kernel, read: list[Tensor], written: list[Tensor]) -> Kernel:
        reads, writes = self._sizes(read), self._sizes(written)
        passes = 2 if kernel.name in _TWO_PASSES else 1
        return replace(
            kernel,
            bytes=passes * sum(reads.values()) + sum(writes.values()),
            launches=kernel.launches * passes,
            reads=tuple(reads.items()),
            writes=tuple(writes.items()),
        )

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Bytes by storage: of several views of one, together no more than it has."""
        sizes: dict[int, int] = {}
        for each in tensors:
            number = self._number(each)
            both = sizes.get(number, 0) + _bytes(each)
            sizes[number] = min(both, each.untyped_storage().nbytes())
        return sizes

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        self._allocated += size
        self._found.peak = max(self._found.peak, self._allocated)
        self._number(tensor)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._allocated -= size
        self._numbers.pop(address, None)

    def _number(self, tensor: Tensor) -> int:
        """Of its storage; an address may be another's later."""
        address = _address(tensor)
        if address not in self._numbers:
            self._numbers[address] = self._next
            self._next += 1
        return self._numbers[address]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Of what is read of it: an expanded tensor is read where it is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _overwritten(op, args, kwargs) -> list[Tensor]:
    values = _by_name(op, args, kwargs)
    written = (values.get(each.name) for each in op._schema.arguments if each.is_write)
    return [each for each in written if isinstance(each, Tensor)]


def _by_name(op, args: tuple, kwargs: dict) -> dict:
    names = (each.name for each in op._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


# -- arithmetic ------------------------------------------------------------------------------------


def _arithmetic(op, name, args, kwargs, result) -> tuple[float, torch.dtype, float]:
    """FLOPs, the dtype whose units make them, and the share of cuBLAS's speed."""
    dtype = next((each.dtype for each in args if isinstance(each, Tensor)), torch.float32)
    values = _by_name(op, args, kwargs)
    if op.namespace == "dst_kernels" and name.startswith(("masked_linear", "masked_conv")):
        weight = values["weight"]
        output = values["grad"] if "grad" in values else result[0]
        flops = 2 * output.numel() // weight.shape[0] * weight.numel()
        gradient = name.endswith("grad_weight")
        share = GRADIENT_PRODUCT if gradient else masked_product(weight.dtype != dtype)
        if weight.dim() > 2 and not _is_product(values):
            # Beside cuDNN, with a column of a tile used where each channel has its own filter.
            share = (TRITON_CONVOLUTION if gradient else share) * CONVOLUTION
            share /= TILE if values["groups"] > 1 else 1
        return flops, dtype, share
    if "convolution" in name:
        return _of_convolution(values, values.get("grad_output", result), dtype)
    counted = flop_registry.get(op._overloadpacket)
    flops = counted(*args, **kwargs, out_val=result) if counted else 0
    return flops, dtype, ATTENTION if "attention" in name else 1.0


def _of_convolution(values: dict, output: Tensor, dtype: torch.dtype):
    """Each of its products; the registry is wrong about those with groups."""
    flops = 2 * output.numel() * values["weight"][0].numel()
    if values["groups"] > 1:
        return flops, torch.float32, DEPTHWISE
    return flops, dtype, 1.0 if _is_product(values) else CONVOLUTION


def _with_its_epilogue(product: Kernel, values: dict, tf32: bool) -> Iterator[Kernel]:
    """A fused dW: W is read and dW written behind the sums of a tile; or, where a weight has too
    few tiles for the GPU, behind a pass over float32 slabs of G, one for each share of tokens.
    """
    weight = values["weight"]
    slabs = _slabs(values, tf32)
    if slabs == 1:
        yield product
        yield Kernel("epilogue", EPILOGUE * 2 * _bytes(weight), launches=0)
        return
    moved = slabs * weight.numel() * 4
    yield replace(product, bytes=product.bytes - 2 * _bytes(weight) + moved, launches=1)
    yield Kernel("slabs", moved + 2 * _bytes(weight), launches=2)


def _slabs(values: dict, tf32: bool) -> int:
    """As the tile for these sizes has it on Hopper."""
    from dst_kernels.backends.triton.tiles import Traits, conv_grad_weight_tile, grad_weight_tile

    grad, weight = values["grad"], values["weight"]
    rows, channels, *taps = weight.shape
    positions, traits = grad.numel() // rows, Traits(grad.dtype, tf32, hopper=True)
    if not taps or _is_product(values):
        return grad_weight_tile(positions, rows, channels, traits, element_wise=False).split
    groups = values["groups"]
    sizes = positions, rows // groups, channels, math.prod(taps) * groups
    return conv_grad_weight_tile(*sizes, traits).split


def _is_product(convolution: dict) -> bool:
    """Of matrices: a kernel of one element at every position."""
    alone = convolution["weight"][0, 0].numel() == 1 and convolution["groups"] == 1
    return alone and all(step == 1 for step in convolution["stride"])


# -- what a compiler makes of it -------------------------------------------------------------------


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """One kernel for each run of kernels between products.

    What nobody outside of a run reads is never written; statistics stay a launch of their own.
    """
    last = {tensor: i for i, kernel in enumerate(kernels) for tensor, _ in kernel.reads}
    result: list[Kernel] = []
    run: list[Kernel] = []
    for i, kernel in enumerate(kernels):
        if kernel.flops == 0:
            run.append(kernel)
            continue
        result += _one_kernel(run, last, i)
        result.append(kernel)
        run = []
    return result + _one_kernel(run, last, len(kernels))


def _one_kernel(run: list[Kernel], last: dict[int, int], end: int) -> list[Kernel]:
    """`last`: where each tensor is read last; `end`: the position behind the run."""
    if not run:
        return []
    reads: dict[int, int] = {}
    writes: dict[int, tuple[int, int]] = {}  # position and size
    launches = 1
    for i, kernel in enumerate(run, end - len(run)):
        passes = 2 if kernel.name in _TWO_PASSES else 1
        launches += passes - 1
        for tensor, size in kernel.reads:
            if tensor not in writes:
                reads[tensor] = max(passes * size, reads.get(tensor, 0))
        writes |= {tensor: (i, size) for tensor, size in kernel.writes}
    # Results, which nobody reads, and what is read behind the run.
    kept = [size for tensor, (i, size) in writes.items() if not i < last.get(tensor, -1) < end]
    return [Kernel("fused", sum(reads.values()) + sum(kept), launches=launches)]
