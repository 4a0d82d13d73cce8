"""Allocate the parameters of a recurrent module as cuDNN needs them: in one buffer, in its order.

Otherwise torch copies them into such a buffer at every call, with a warning.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def empty_parameters(
    module: nn.RNNBase, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return tensors for the parameters of `module`, in the order of its `_flat_weights`.

    They share one buffer if cuDNN will use them, but are not views of each other for autograd.
    Their contents are undefined.
    """
    if not (torch._use_cudnn_rnn_flatten_weight() and cudnn_takes(dtype, device)):
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    names = "mode", "input_size", "hidden_size", "proj_size", "num_layers", "bidirectional"
    kind = tuple(getattr(module, name) for name in names)
    size, offsets = _cudnn_layout(kind, tuple(shapes), dtype, device)
    # cuDNN's buffer has biases even if the module has none: that part must be zeros.
    fills = sum(shape.numel() for shape in shapes) == size
    buffer = (torch.empty if fills else torch.zeros)(size, dtype=dtype, device=device)
    return _tensors_in(buffer, offsets, shapes)


def cudnn_takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch gives recurrent layers of this dtype on this device to cuDNN (MIOpen).

    MIOpen, on AMD's GPUs, takes parameters that lie apart.
    """
    if device.type != "cuda":
        return False
    return torch.backends.cudnn.is_acceptable(torch.empty(0, dtype=dtype, device=device))


def _tensors_in(
    buffer: Tensor, offsets: Sequence[int], shapes: Sequence[torch.Size]
) -> list[Tensor]:
    storage = buffer.untyped_storage()
    empty = [torch.empty(0, dtype=buffer.dtype, device=buffer.device) for _ in shapes]
    # torch's stub lacks the overload without strides.
    return [
        tensor.set_(storage, offset, shape)  # type: ignore[call-overload]
        for tensor, offset, shape in zip(empty, offsets, shapes, strict=True)
    ]


@functools.lru_cache
@torch.no_grad()
def _cudnn_layout(
    kind: tuple, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, list[int]]:
    """Return (elements in the buffer, offset of each parameter), as torch arranges them."""
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
            False,  # batch_first, which does not matter here
            bidirectional,
        )
    return buffer.numel(), [int(tensor.storage_offset()) for tensor in tensors]
