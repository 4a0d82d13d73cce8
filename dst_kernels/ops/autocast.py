"""Whether autocast is on, also for tensors that are on no device."""

from __future__ import annotations

import torch


def autocast_enabled(device_type: str) -> bool:
    """`torch.is_autocast_enabled`, which raises for the meta device, where this is False."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
