"""What the choice of kernels depends on besides the tensors: the GPU and its settings."""

from __future__ import annotations

import functools

import torch

__all__ = ["capability", "gpu_name", "tf32_allowed"]


def gpu_name(device: torch.device) -> str | None:
    """As torch reports it, e.g. "NVIDIA H200"; None where there is none (a fake tensor's, say)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _properties(device.index).name


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability (major, minor); None where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = _properties(device.index)
    return properties.major, properties.minor


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)


def tf32_allowed() -> bool:
    """Whether torch lets float32 matmuls on CUDA round their operands to TF32."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":  # not set by itself
        precision = torch.backends.fp32_precision
    return precision == "tf32"
