"""Keep torch's encoder layers from a fused kernel that reads their weights.

In evaluation `nn.TransformerEncoderLayer` passes its weights directly to one fused kernel and calls
none of its layers. It does so only if its `activation_relu_or_gelu` is set, which nothing else
reads.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from ..nn import MaskedModule
from ..nn.sparse import SparseLayer


def avoid_fast_path(model: nn.Module) -> None:
    """Make encoders that hold masked or sparse layers call these layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_our_layers(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _has_our_layers(module):
            module.use_nested_tensor = False  # only the fused kernel takes nested tensors


def restore_fast_path(model: nn.Module) -> None:
    """Set the flag as the constructor does, in encoder layers without such layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _has_our_layers(module):
            activation = module.activation
            if activation is F.relu or isinstance(activation, nn.ReLU):
                module.activation_relu_or_gelu = 1
            elif activation is F.gelu or isinstance(activation, nn.GELU):
                module.activation_relu_or_gelu = 2


def _has_our_layers(module: nn.Module) -> bool:
    return any(isinstance(each, (MaskedModule, SparseLayer)) for each in module.modules())
