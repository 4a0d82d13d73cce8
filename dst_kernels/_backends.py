"""Which implementation serves a call.

`"auto"` takes the best that is there (the environment variable DST_KERNELS_BACKEND names another
choice for it); a backend asked for by name is used or the call fails, never replaced in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from . import reference
from ._device import capability

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "check_backend",
    "implementation",
    "resolve",
    "unavailable",
]

BACKENDS = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "DST_KERNELS_BACKEND"

_LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores; older GPUs are not tested


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Why the backend `name` cannot serve tensors on `device`, or None where it can.

    Without a device: why it can serve none at all.
    """
    if name == "cuda":
        return "this version of dst_kernels has no cuda kernels yet"
    if name == "triton":
        if not _triton_is_installed():
            return "Triton is not installed"
        return None if device is None else _triton_refuses(device)
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_refuses(device: torch.device) -> str | None:
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "its kernels are written for NVIDIA GPUs"
        found = capability(device)
        # None for a fake tensor, which may be on a GPU that is not there.
        if found is None or found >= _LEAST_CAPABILITY:
            return None
        return (
            f"it needs a GPU of compute capability {_dotted(_LEAST_CAPABILITY)} or higher, "
            f"but {device} has {_dotted(found)}"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: slow, for tests
    return f"it needs tensors on a CUDA device, but these are on {device}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, but is {name!r}")


def resolve(backend: str, device: torch.device | None = None) -> str:
    """The name of the backend that serves `backend` for tensors on `device`.

    Raises ValueError for an unknown name and RuntimeError for one that cannot serve. Without a
    device, whatever could serve some device passes.
    """
    argument = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        argument = ENVIRONMENT_VARIABLE
    check_backend(backend, argument)
    if backend == "auto":
        on_gpu = device is not None and device.type == "cuda"
        return "triton" if on_gpu and unavailable("triton", device) is None else "reference"
    reason = unavailable(backend, device)
    if reason is not None:
        raise RuntimeError(
            f"{argument}={backend!r} cannot serve: {reason}. Use backend='auto' or 'reference'."
        )
    return backend


def implementation(backend: str, device: torch.device, op: str) -> Callable:
    """The function that serves `op` for `backend` on `device`.

    Errors as in `resolve`; RuntimeError also where the backend has no such op.
    """
    backend = resolve(backend, device)
    if backend == "triton":
        from . import _triton as module
    else:
        module = reference
    function = getattr(module, op, None)
    if function is None:
        raise RuntimeError(
            f"the {backend} backend has no fused {op}: use path='packed' or path='auto'"
        )
    return function
