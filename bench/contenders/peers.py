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
warnings.filterwarnings(
    "ignore", "Sparse CSR tensor support is in beta|The given NumPy array is not"
)


def set_threads(count: int) -> None:
    """Let torch use so many threads, and each OpenMP runtime that a peer has brought along."""
    torch.set_num_threads(count)
    if threadpoolctl := sys.modules.get("threadpoolctl"):
        threadpoolctl.threadpool_limits(count, "openmp")


def fix_(model: nn.Module, input: Tensor, peer: Callable | None = None) -> nn.Module:
    """Fix all masks, in place, and let a `peer` make the masked layers; returns the model.

    Each such layer has a method `dense_weight`, so that all can be compared.
    """
    dst_kernels.freeze_masks_(model)
    layers = dict(model.named_modules())
    layers = {n: m for n, m in layers.items() if isinstance(m, (MaskedLinear, MaskedConv2d))}
    if peer is None:
        for layer in layers.values():
            layer.dense_weight = lambda layer=layer: layer.weight * layer.mask()
        return model
    if input.device.type != "cpu":
        raise RuntimeError(f"it computes on a CPU only, not on {input.device.type}")
    shapes: dict[nn.Module, torch.Size] = {}
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: shapes.update({module: inputs[0].shape})
    )
    with hook, torch.no_grad():
        model.eval()(input)
    dst_kernels.finalize_(model.train()).to(memory_format=torch.contiguous_format)
    for name, layer in layers.items():
        model.set_submodule(name, peer(layer, shapes[layer]))
    return model


def sparselab(layer: nn.Module, shape: torch.Size) -> nn.Module:
    """Return SparseLab's twin of a layer; raises ImportError without it, TypeError if none."""
    import numpy
    import sparselab
    import threadpoolctl  # noqa: F401  (see `set_threads`)

    if not isinstance(layer, nn.Linear):
        raise TypeError(f"sparselab has linear layers only, no {type(layer).__name__}")
    twin = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=0.999)
    # As its constructor does it with weights that it draws.
    twin._csr = sparselab.PaddedCSR.from_dense(layer.weight.detach())
    twin._values = nn.Parameter(torch.from_numpy(numpy.asarray(twin._csr.values)))
    twin.bias, twin.dense_weight = layer.bias, twin._csr.to_dense
    return twin


def sparseprop(layer: nn.Module, shape: torch.Size) -> nn.Module:
    """Return SparseProp's twin of a layer, of two convolutions the faster; or ImportError."""
    import threadpoolctl  # noqa: F401  (see `set_threads`)
    from sparseprop.modules import SparseLinear, sparsify_conv2d_auto

    set_threads(torch.get_num_threads())
    linear = isinstance(layer, nn.Linear)
    twin = SparseLinear.from_dense(layer) if linear else sparsify_conv2d_auto(layer, shape)
    twin.dense_weight = lambda: twin.to_dense().weight
    if getattr(twin, "vectorizing_over_on", False):  # it takes any layout for that of NCHW
        twin.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
        twin.register_forward_hook(_contiguous_gradient)
    return twin


def _contiguous_gradient(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    output.register_hook(torch.Tensor.contiguous)
