"""Print versions, devices, libraries and backends, and why any is missing.

With arguments, `python -m dst_kernels` is the command `dst-kernels`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .backends import BACKENDS, ENVIRONMENT_VARIABLE, unavailable
from .backends.compiled import library


def main() -> None:
    """Print the report to stdout, a line for each item."""
    rows = [
        ("dst_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"),
        ("triton", _installed("triton")),
        ("device", _device()),
        ("CPU threads", str(torch.get_num_threads())),
        (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "not set")),
    ]
    for name in ("cpu", "cuda"):
        rows.append((f"library {name}", _library(name)))
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in BACKENDS[1:]:
        reason = unavailable(backend, torch.device("cpu") if backend == "cpu" else best)
        rows.append((f"backend {backend}", "available" if reason is None else f"no: {reason}"))
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name.ljust(width)}  {value}\n" for name, value in rows))


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library(name: str) -> str:
    reason = library.unavailable(name)
    return f"no: {reason}" if reason else f"{library.path(name)} ({library.describe(name)})"


def _device() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor})" for p in names)


if __name__ == "__main__":
    if sys.argv[1:]:
        from .training.cli import main as command

        command()
    else:
        main()
