"""torch's fused encoder layer, which reads weights behind the layers' backs.

In evaluation `nn.TransformerEncoderLayer` hands its weights straight to one fused kernel and calls
none of its layers, so a mask would be ignored. The layer takes that path only where its
`activation_relu_or_gelu` is set, a flag nothing else reads.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from ..nn import MaskedModule


def avoid_fast_path(model: nn.Module) -> None:
    """Where masked layers stand in such an encoder, keep it on the path that calls them."""
    for module in model.modules():
        if _is_masked(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif _is_masked(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # the ordinary path cannot take nested tensors


def restore_fast_path(model: nn.Module) -> None:
    """The layer's flag as its constructor would set it, where no masked layer is left."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _is_masked(module, nn.Module):
            activation = module.activation
            if activation is F.relu or isinstance(activation, nn.ReLU):
                module.activation_relu_or_gelu = 1
            elif activation is F.gelu or isinstance(activation, nn.GELU):
                module.activation_relu_or_gelu = 2


def _is_masked(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and any(isinstance(m, MaskedModule) for m in module.modules())
