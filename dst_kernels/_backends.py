"""Which implementation serves a call.

`"auto"` takes the best that is there (the environment variable DST_KERNELS_BACKEND names another
choice for it); a backend asked for by name is used or the call fails, never replaced in silence.
"""

from __future__ import annotations

import os
from types import ModuleType

from . import reference

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "check_backend", "implementation", "unavailable"]

BACKENDS = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "DST_KERNELS_BACKEND"

_NOT_BUILT = "this version of dst_kernels has no {} kernels yet"


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot serve, or None where it can."""
    return _NOT_BUILT.format(name) if name in ("triton", "cuda") else None


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, but is {name!r}")


def implementation(backend: str) -> ModuleType:
    """The module whose functions serve `backend`.

    Raises ValueError for an unknown name and RuntimeError for one that cannot serve.
    """
    argument = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        argument = ENVIRONMENT_VARIABLE
    check_backend(backend, argument)
    reason = unavailable(backend)
    if reason is not None:
        raise RuntimeError(
            f"{argument}={backend!r} cannot serve: {reason}. Use backend='auto' or 'reference'."
        )
    return reference
