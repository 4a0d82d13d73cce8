"""Tell whether autocast is on, also for tensors on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor


def device_type_of(tensor: Tensor) -> str:
    """Return `tensor.device.type`, faster for CPU tensors."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_enabled(device_type: str) -> bool:
    """Return `torch.is_autocast_enabled`, and False for the meta device, where that raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
