"""Choose and name the device of a run."""

from __future__ import annotations

import torch

from . import processes
from .errors import UsageError


def select_device(name: str) -> torch.device:
    """Return the device of a --device option; raise UsageError if it is unknown or missing.

    Of several processes on a machine each gets the GPU of its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    accepted = "Accepted: auto, cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is unknown. {accepted}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported. {accepted}")
    local_rank, local_processes = processes.on_this_machine()
    if device.type == "cuda" and local_processes > 1:
        gpus = torch.cuda.device_count()
        if device.index is not None or local_processes > gpus:
            raise UsageError(
                f"--device {name!r} with {local_processes} processes on a machine with {gpus} GPUs."
                " Accepted: auto, cpu, or cuda with a GPU for each process."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # collectives of objects on the GPU go there
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name!r}: torch finds no such device here. {accepted}")
    return device


def device_name(device: torch.device) -> str:
    """Return the device's name for a summary: the GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
