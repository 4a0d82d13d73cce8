"""Say in which dtype a device adds up and counts."""

from __future__ import annotations

import functools

import torch


@functools.cache
def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it, such as Apple's and many Intel GPUs."""
    if device.type not in ("cpu", "cuda", "meta"):
        try:  # some make such a tensor, but have no kernel for it
            torch.ones((), dtype=torch.float64, device=device).add_(1)
        except (RuntimeError, TypeError):
            return torch.float32
    return torch.float64
