"""Read what else the choice of kernels depends on: the GPU, torch's settings, the environment."""

from __future__ import annotations

import functools
import os

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
    known = getattr(os.environ, "_data", None)
    if known is None:
        return os.environ.get(name)
    value = known.get(_encoded(name))
    return None if value is None else os.environ.decodevalue(value)


_encoded = functools.cache(os.environ.encodekey)


def tf32_allowed(*, convolution: bool = False) -> bool:
    """Return whether torch lets float32 products on CUDA round their operands to TF32.

    By default it does so for convolutions, not for matrix products.
    """
    of_matmul = (torch.backends.cuda.matmul,)
    # torch puts a class in the place of the module `cudnn`, which mypy does not see.
    of_conv = (torch.backends.cudnn.conv, torch.backends.cudnn)  # type: ignore[attr-defined]
    for settings in (*(of_conv if convolution else of_matmul), torch.backends):
        if settings.fp32_precision != "none":  # "none": the next, more general setting decides
            return settings.fp32_precision == "tf32"
    return False
