"""Where cuDNN wants the parameters of a recurrent module: in one buffer, in an order of its own.

Parameters that lie elsewhere are copied there by torch, with a warning, at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def empty_parameters(
    module: nn.RNNBase, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Memory for the parameters of `module`, in the order of its `_flat_weights`.

    On GPUs where cuDNN wants it; elsewhere each by itself. No views of each other for autograd.
    """
    if not cudnn_takes(dtype, device):
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    names = "mode", "input_size", "hidden_size", "proj_size", "num_layers", "bidirectional"
    kind = tuple(getattr(module, name) for name in names)
    size, offsets = _cudnn_layout(kind, tuple(shapes), dtype, device)
    # Where parameters do not fill it (no biases) the rest must be zeros.
    fills = sum(shape.numel() for shape in shapes) == size
    buffer = (torch.empty if fills else torch.zeros)(size, dtype=dtype, device=device)
    return _tensors_in(buffer, offsets, shapes)


def cudnn_takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has parameters like these flattened for cuDNN."""
    if device.type != "cuda":
        return False
    return torch.backends.cudnn.is_acceptable(torch.empty(0, dtype=dtype, device=device))


def _tensors_in(
    buffer: Tensor, offsets: Sequence[int], shapes: Sequence[torch.Size]
) -> list[Tensor]:
    storage = buffer.untyped_storage()
    return [
        torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(storage, offset, shape)
        for offset, shape in zip(offsets, shapes, strict=True)
    ]


@functools.lru_cache
@torch.no_grad()
def _cudnn_layout(
    kind: tuple, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, list[int]]:
    """(elements in the buffer, offset of each parameter), as torch itself lays them out."""
    import torch.backends.cudnn.rnn as cudnn_rnn

    mode, input_size, hidden_size, proj_size, num_layers, bidirectional = kind
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    with torch.cuda.device(device):
        buffer = torch._cudnn_rnn_flatten_weight(
            tensors,
            len(tensors) // (num_layers * (1 + bidirectional)),
            input_size,
            cudnn_rnn.get_cudnn_mode(mode),
            hidden_size,
            proj_size,
            num_layers,
            False,  # whether batches come first, which changes nothing here
            bidirectional,
        )
    return buffer.numel(), [tensor.storage_offset() for tensor in tensors]
