"""Decide which backend runs a call.

"auto" takes the best available backend for each op; the environment variable DST_KERNELS_BACKEND
can name another one in its place. A backend asked for by name is used, or the call fails: it is
never replaced silently.

Kernels are for CPUs and NVIDIA's GPUs. On all other devices (AMD's GPUs, which torch also calls
"cuda", Intel's "xpu", Apple's "mps") "auto" is the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

from .. import reference
from .compiled import library
from .device import capability, encoded, environment, variable

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "DST_KERNELS_BACKEND"

_encoded_variable = encoded(ENVIRONMENT_VARIABLE)

# Best first; the reference has every op and comes last. Only Triton has fused products.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_MODULES = {"cpu": ".compiled.ops", "cuda": ".compiled.ops", "triton": ".triton"}
_PRODUCTS = ("masked_linear", "masked_conv")  # only fused and mixed paths need these ops
_LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores; older GPUs are not tested


def unavailable(
    name: str, device: torch.device | None = None, *, double: bool = False
) -> str | None:
    """Return why the backend `name` cannot run on tensors on `device`, or None if it can.

    `double`: float64 is among the dtypes. Without a device: why it cannot run on any.
    """
    if name == "reference":
        return None
    if name == "triton":
        if not _triton_is_installed():
            return "Triton is not installed"
        if device is not None and device.type == "cpu" and _is_interpreted():
            return None
        return _gpu_refuses(device)
    reason = library.unavailable(name)
    if reason is not None or device is None:
        return reason
    if name == "cpu":
        return None if device.type == "cpu" else f"it needs tensors on a CPU, not on {device}"
    if double:
        return "its kernels take float16, bfloat16 and float32, but not float64"
    return _gpu_refuses(device)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gpu_refuses(device: torch.device | None) -> str | None:
    if device is None:
        return None
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, but these are on {device}"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs"
    found = capability(device)
    # None: a fake tensor may be on a GPU that this machine lacks.
    if found is None or found >= _LEAST_CAPABILITY:
        return None
    return (
        f"it needs a GPU of compute capability {_dotted(_LEAST_CAPABILITY)} or higher, "
        f"but {device} has {_dotted(found)}"
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, but is {name!r}")


def serving(backend: str, device: torch.device | None, *, double: bool = False) -> tuple[str, ...]:
    """Return the names of the backends that `backend` stands for on `device`, best first.

    "auto" stands for all that can run there, or for the reference if none can; another name stands
    for itself. Without a device, a backend that can run on some device is accepted. `double`:
    float64 is among the dtypes. Raises ValueError for an unknown name, RuntimeError for a backend
    asked for by name that cannot run there.
    """
    return _serving(*_asked_for(backend), device, double)


@functools.cache
def _serving(
    argument: str, backend: str, interpreted: bool, device: torch.device | None, double: bool
) -> tuple[str, ...]:
    check_backend(backend, argument)
    if backend == "auto":
        preferred = () if device is None else _PREFERRED.get(device.type, ())
        found = [name for name in preferred if unavailable(name, device, double=double) is None]
        return tuple(found) or ("reference",)
    reason = unavailable(backend, device, double=double)
    if reason is not None:
        raise RuntimeError(
            f"{argument}={backend!r} cannot serve: {reason}. Use backend='auto' or 'reference'."
        )
    return (backend,)


def _asked_for(backend: str) -> tuple[str, str, bool]:
    """Return (argument or variable that names the backend, the name, Triton is interpreted).

    These are the keys of the caches, because the environment may change at any time.
    """
    argument = "backend"
    if backend == "auto":
        argument = ENVIRONMENT_VARIABLE
        backend = variable(argument) or backend
    return argument, backend, backend == "triton" and _is_interpreted()


def _is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, on CPUs too: slow, for tests."""
    return variable("TRITON_INTERPRET") == "1"


def resolve(backend: str, device: torch.device | None = None) -> str:
    """Return the first name that `serving` returns."""
    return serving(backend, device)[0]


def implementation(
    backend: str, device: torch.device, op: str, *, double: bool = False
) -> Callable:
    """Return the function that runs `op` for `backend` on `device`.

    Raises what `serving` does, and RuntimeError if a backend asked for by name lacks the op.
    """
    return _implementation(op, *_asked_for(backend), device, double)


@functools.cache
def _implementation(
    op: str, argument: str, backend: str, interpreted: bool, device: torch.device, double: bool
) -> Callable:
    names = _serving(argument, backend, interpreted, device, double)
    for name in names:
        function = getattr(_module(name), op, None)
        if function is not None:
            return function
    if backend == "auto":
        return getattr(reference, op)
    if op.startswith(_PRODUCTS):
        what = f"fused {op}: use path='packed' or path='auto'"
    else:
        what = f"{op.rstrip('_')}: use another backend"
    raise RuntimeError(f"the {names[0]} backend has no {what}")


def direct(op: str, device: torch.device, dtype: torch.dtype) -> Callable:
    """Return what runs `op` for "auto" on tensors of one dtype on `device`, in the fewest steps.

    The library's own op takes them on a CPU as its Python function does. Raises what
    `implementation` does.
    """
    return _direct(op, device, dtype, environment.get(_encoded_variable))


@functools.cache
def _direct(
    op: str, device: torch.device, dtype: torch.dtype, asked_for: bytes | str | None
) -> Callable:
    run = implementation("auto", device, op)
    if device.type != "cpu" or resolve("auto", device) != "cpu":
        return run
    from .compiled.sparse import DIRECT

    own, dtypes = DIRECT[op]
    return own if dtype in dtypes else run


def forget() -> None:
    """Empty the caches, for tests that change which backends are available."""
    _serving.cache_clear()
    _implementation.cache_clear()
    _direct.cache_clear()


@functools.cache
def _module(name: str):
    if name == "reference":
        return reference
    return importlib.import_module(_MODULES[name], __package__)
