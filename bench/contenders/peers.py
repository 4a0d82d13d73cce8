"""Fixed masks: ours, and libraries that train with such masks on CPUs (the extra `peers`)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dst_kernels
from dst_kernels.nn import MaskedConv2d, MaskedLinear

# Of sparselab, when it makes a layer and when it shows the weight.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in|The given NumPy array is not")


def set_threads(count: int) -> None:
    """Let torch use so many threads, and each OpenMP runtime that a peer has brought along."""
    torch.set_num_threads(count)
    if any(map(sys.modules.get, ("sparselab", "sparseprop"))):
        import threadpoolctl

        threadpoolctl.threadpool_limits(count, "openmp")


def fix_(model: nn.Module, input: Tensor, peer: Callable | None = None) -> nn.Module:
    """Fix all masks, in place, and let a `peer` make the masked layers; returns the model.

    Each such layer has a method `dense_weight`, so that all can be compared.
    """
    kinds, shapes = (MaskedLinear, MaskedConv2d), {}
    layers = {name: one for name, one in model.named_modules() if isinstance(one, kinds)}
    dst_kernels.freeze_masks_(model)
    for layer in layers.values():
        layer.dense_weight = lambda layer=layer: layer.weight * layer.mask()
    if peer is None:
        return model
    if input.device.type != "cpu":
        raise RuntimeError(f"it computes on a CPU only, not on {input.device.type}")
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda one, args: shapes.update({one: args[0].shape}))
    with torch.no_grad():
        model.eval()(input)
    dst_kernels.finalize_(model.train()).to(memory_format=torch.contiguous_format)
    for name, layer in layers.items():
        model.set_submodule(name, peer(layer, shapes[layer]))
    return model


def sparselab(layer: nn.Module, shape: torch.Size) -> nn.Module:
    """Return SparseLab's twin of a linear layer."""
    import sparselab

    set_threads(torch.get_num_threads())
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"sparselab has linear layers only, no {type(layer).__name__}")
    twin = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=0.999)
    # As its constructor does it with weights that it draws.
    twin._csr = sparselab.PaddedCSR.from_dense(layer.weight.detach())
    twin._values = nn.Parameter(torch.from_numpy(twin._csr.values))
    twin.bias, twin.dense_weight = layer.bias, twin._csr.to_dense
    return twin


def sparseprop(layer: nn.Module, shape: torch.Size) -> nn.Module:
    """Return SparseProp's twin of a layer, of its two kinds of convolution the faster."""
    from sparseprop.modules import SparseLinear, sparsify_conv2d_auto

    set_threads(torch.get_num_threads())
    linear = isinstance(layer, nn.Linear)
    twin = SparseLinear.from_dense(layer) if linear else sparsify_conv2d_auto(layer, shape)
    twin.dense_weight = lambda: twin.to_dense().weight
    if getattr(twin, "vectorizing_over_on", False):  # it takes any layout for that of NCHW
        twin.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
        twin.register_forward_hook(lambda *args: args[2].register_hook(Tensor.contiguous) and None)
    return twin
