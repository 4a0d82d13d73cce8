"""Find the libraries, load them at first use, and say why one cannot be used."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)
_NEWEST_OP = "kept_conv_grad_weight"  # that a library built from these sources has
_FOLDER = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_NEEDED = {
    "cpu": "a C++20 compiler (CXX, else on the PATH)",
    "cuda": "nvcc (in CUDA_HOME/bin, in CUDA_PATH/bin or on the PATH) and a C++20 compiler",
}


def path(name: str) -> Path:
    """Return the file of the library "cpu" or "cuda", whether it exists or not."""
    return _FOLDER / f"libdst_kernels_{name}{_SUFFIX}"


BUILT = {name: path(name).exists() for name in _NEEDED}
"""Whether each library's file exists: known without loading it, and constant for compilers."""


@functools.cache
def unavailable(name: str) -> str | None:
    """Load the library "cpu" or "cuda", once; return why it cannot be used, or None."""
    file = path(name)
    if not BUILT[name]:
        return (
            f"{file.name} was not built: there is no {file}. In the source tree, "
            f"'DST_KERNELS_BUILD_{name.upper()}=1 pip install --no-build-isolation -e .' builds "
            f"it with {_NEEDED[name]}"
        )
    if torch.__version__ < OLDEST_TORCH:  # type: ignore[operator]  # it compares with tuples
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"{file.name} needs torch {oldest} or later, but this is {torch.__version__}"
    if name == "cuda":
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) was built without CUDA"
        reason = unavailable("cpu")  # the library for the CPU defines the schemas
        if reason is not None:
            return f"it needs the library for the CPU, but {reason}"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        reason = f"{file} cannot be loaded: {error.__cause__ or error}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    if not hasattr(torch.ops.dst_kernels_compiled, _NEWEST_OP):
        reason = (
            f"{file} was built from older sources: build it again by "
            "'pip install --no-build-isolation -e .'"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    return None


def describe(name: str) -> str:
    """Return what a loaded library was built with."""
    text = ctypes.c_char.in_dll(ctypes.CDLL(str(path(name))), "dst_kernels_build")
    return ctypes.string_at(ctypes.addressof(text)).decode()
