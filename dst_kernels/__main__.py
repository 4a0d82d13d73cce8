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
        ("torch", f"{torch.__version__} ({_toolkit()})"),
        ("triton", _installed("triton")),
        ("device", _device()),
        ("CPU threads", str(torch.get_num_threads())),
        (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "not set")),
    ]
    for name in ("cpu", "cuda"):
        rows.append((f"library {name}", _library(name)))
    found = torch.accelerator.current_accelerator(check_available=True)
    best = torch.device("cpu") if found is None else found
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


def _toolkit() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda or 'not built in'}"


def _device() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return "no GPU"
    if found.type != "cuda":
        return f"{torch.accelerator.device_count()} of {found.type}, which the reference serves"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if torch.version.hip is not None:
        return ", ".join(f"{p.name} ({p.gcnArchName}), which the reference serves" for p in names)
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor})" for p in names)


if __name__ == "__main__":
    if sys.argv[1:]:
        from .training.cli import main as command

        command()
    else:
        main()
