"""Read what else the choice of kernels depends on: the GPU, torch's settings, the environment."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch


def gpu_name(device: torch.device) -> str | None:
    """Return torch's name of the GPU, e.g. "NVIDIA H200"; None if there is no such GPU."""
    properties = _properties(device)
    return None if properties is None else properties.name


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability (major, minor); None if there is no such GPU."""
    properties = _properties(device)
    return None if properties is None else (properties.major, properties.minor)


@functools.cache
def _properties(device: torch.device):
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device.index)


def variable(name: str) -> str | None:
    """Return `os.environ.get(name)`, but without its slow exceptions for a variable not set."""
    value = environment.get(encoded(name))
    return None if value is None else os.environ.decodevalue(value)


# Where os.environ keeps its variables: its own `get` raises and catches for one that is not set.
environment = getattr(os.environ, "_data", os.environ)
encoded = functools.cache(os.environ.encodekey)


def tf32_allowed(*, convolution: bool = False) -> bool:
    """Return whether torch lets float32 products on CUDA round their operands to TF32.

    By default it does so for convolutions, not for matrix products.
    """
    settings: Any = torch.backends  # it and `cudnn` have more than mypy sees
    precision = (settings.cudnn.conv if convolution else settings.cuda.matmul).fp32_precision
    if precision == "none" and convolution:  # "none": the next, more general setting decides
        precision = settings.cudnn.fp32_precision
    if precision == "none":
        precision = settings.fp32_precision
    return precision == "tf32"
