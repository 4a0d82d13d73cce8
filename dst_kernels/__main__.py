"""`python -m dst_kernels`: versions, device and backends, and why a backend is not there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from ._backends import BACKENDS, ENVIRONMENT_VARIABLE, unavailable


def main() -> None:
    """Print the report."""
    rows = [
        ("dst_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"),
        ("triton", _installed("triton")),
        ("device", _device()),
        ("CPU threads", str(torch.get_num_threads())),
        (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "not set")),
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in BACKENDS[1:]:
        reason = unavailable(backend, device)
        rows.append((f"backend {backend}", "available" if reason is None else f"no: {reason}"))
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name.ljust(width)}  {value}\n" for name, value in rows))


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor})" for p in names)


if __name__ == "__main__":
    main()
