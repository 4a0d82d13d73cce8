"""Choose and name the device of a run."""

from __future__ import annotations

import torch

from . import processes
from .errors import UsageError

ACCEPTED = "auto, cpu, cuda (NVIDIA, AMD), xpu (Intel), mps (Apple), or cuda:N or xpu:N."


def select_device(name: str) -> torch.device:
    """Return the device of a --device option; raise UsageError if it is unknown or missing.

    Of several processes on a machine each gets the GPU of its number.
    """
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu") if _count(kind)), "cpu")
    accepted = f"Accepted: {ACCEPTED}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is unknown. {accepted}") from error
    kind = device.type
    if kind not in ("cpu", "cuda", "xpu", "mps"):
        raise UsageError(f"--device {name!r} is not supported. {accepted}")
    local_rank, local_processes = processes.on_this_machine()
    if kind != "cpu" and local_processes > 1:
        gpus = _count(kind)
        if device.index is not None or local_processes > gpus:
            raise UsageError(
                f"--device {name!r} with {local_processes} processes on a machine with {gpus} GPUs."
                " Accepted: auto, cpu, or cuda or xpu with a GPU for each process."
            )
        device = torch.device(kind, local_rank)
        torch.get_device_module(kind).set_device(device)  # objects are collected on the GPU there
    if kind != "cpu" and (device.index or 0) >= _count(kind):
        raise UsageError(f"--device {name!r}: torch finds no such device here. {accepted}")
    return device


def _count(kind: str) -> int:
    """Return how many GPUs of a kind ("cuda", "xpu" or "mps") torch finds."""
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def device_name(device: torch.device) -> str:
    """Return the device's name for a summary: the GPU's model, or what torch calls its kind."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    return device.type
