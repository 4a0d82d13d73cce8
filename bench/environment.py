"""Where and when rows were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import UsageError

__all__ = ["CPU", "PREDICTED", "ROOT", "Environment", "choose_device", "is_predicted", "slug"]

CPU = "cpu"
PREDICTED = ", predicted"
"""Ends the name of a device on which nothing of it was measured."""
ROOT = Path(__file__).resolve().parent.parent
_UNKNOWN = "unknown"
_CODE = ("dst_kernels", "csrc", "bench", ":!bench/results")  # what a figure depends on


@dataclass(frozen=True)
class Environment:
    """The columns that all rows of one run share; `date` (UTC) tells runs apart."""

    gpu: str
    torch: str
    triton: str
    commit: str
    date: str

    @classmethod
    def now(cls, device: torch.device, commit: str | None = None) -> Environment:
        """`commit`: for a copy of the code without its history; else git is asked."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = "none"
        return cls(gpu, torch.__version__, triton, commit or _commit(), _now())

    @classmethod
    def of_prediction(cls, gpu: str, commit: str | None = None) -> Environment:
        """For a GPU of that name: nothing runs, so there are no versions of what would run."""
        return cls(gpu + PREDICTED, "none", "none", commit or _commit(), _now())

    def made(self, row: object) -> bool:
        """Whether a row was measured on this device, with these versions, at this commit."""
        columns = ("gpu", "torch", "triton", "commit")
        return all(getattr(row, name) == getattr(self, name) for name in columns)

    @property
    def identifies_code(self) -> bool:
        """Whether another run with the same commit ran the same code."""
        return self.commit != _UNKNOWN and not self.commit.endswith("-dirty")


def choose_device(name: str | None) -> torch.device:
    """ "cuda", "cpu" or None: CUDA where there is one.

    Raises UsageError for another name and for CUDA where there is none.
    """
    if name not in (None, "cuda", "cpu"):
        raise UsageError(f"--device is {name!r}. Accepted: cuda, cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device is 'cuda', but torch sees no CUDA device here. Accepted here: --device cpu."
        )
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def is_predicted(gpu: str) -> bool:
    """Whether rows of a device by that name were predicted."""
    return gpu.endswith(PREDICTED)


def slug(text: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return _UNKNOWN


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
