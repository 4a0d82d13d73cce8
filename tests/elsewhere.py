"""A device "elsewhere", made of CPU memory: one that is neither a CPU nor CUDA, without float64.

The import makes it, for all of the process. Operations run on the CPU; tensors say otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "elsewhere"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_there: dict[tuple, Tensor] = {}  # by the CPU's memory
_here: dict[int, tuple] = {}  # the CPU's memory, by the storage of a tensor of the device
aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device):
        pass


def _to_cpu(value):
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    if not isinstance(value, Tensor) or value.device.type != NAME:
        return value
    memory, offset = _here[value.untyped_storage()._cdata]
    place = offset + value.storage_offset(), value.size(), value.stride()
    return torch.empty(0, dtype=value.dtype).set_(memory, *place)


def _from_cpu(value):
    if not isinstance(value, Tensor):
        return value
    if value.dtype is torch.float64:
        raise TypeError(f"{NAME} has no float64")
    memory = value.untyped_storage(), value.storage_offset()
    key = memory[0]._cdata, memory[1], value.dtype
    if key not in _there:
        _there[key] = torch._C._acc.create_empty_tensor([0], value.dtype)
        _here[_there[key].untyped_storage()._cdata] = memory
    return aten._reshape_alias.default.redispatch(_CPU, _there[key], value.size(), value.stride())


def _run(op, *args, **options):
    if op is aten._copy_from.default:
        _to_cpu(args[1]).copy_(_to_cpu(args[0]))
        return args[1]
    given, form = pytree.tree_flatten((args, options))
    moved = [_to_cpu(value) for value in given]
    args, options = pytree.tree_unflatten(moved, form)
    output = op(*args, **options)
    own = {}
    for there, here in zip(moved, given, strict=True):
        if isinstance(here, Tensor):
            own[id(there)] = here
            if here.shape != there.shape:  # an `out=` that has grown
                here.data = _from_cpu(there)
    return pytree.tree_map(lambda t: own[id(t)] if id(t) in own else _from_cpu(t), output)


def _conv_backward(grad, input, weight, *rest):
    return _run(aten.convolution_backward.default, grad, input, weight, [len(weight)], *rest)


def _cast(op):
    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*(a.bfloat16() if isinstance(a, Tensor) else a for a in args))

    return run


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_others = torch.library.Library("_", "IMPL")
_others.fallback(_run, "PrivateUse1")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_own = torch.library.Library("aten", "IMPL")
_own.impl(
    "convolution_overrideable",
    lambda *args: _run(aten.convolution.default, *args),
    "PrivateUse1",
)
_own.impl("convolution_backward_overrideable", _conv_backward, "PrivateUse1")
_own.impl("linear", _cast(aten.linear.default), "AutocastPrivateUse1")
_own.impl("conv2d", _cast(aten.conv2d.default), "AutocastPrivateUse1")
