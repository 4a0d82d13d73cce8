"""Whether autocast is on, also for tensors that are on no device."""

from __future__ import annotations

import torch
from torch import Tensor


def device_type_of(tensor: Tensor) -> str:
    """`tensor.device.type`, which takes a while to make."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_enabled(device_type: str) -> bool:
    """`torch.is_autocast_enabled`, which raises for the meta device, where this is False."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
