"""How compiled contenders are compiled, the baselines as our own layers."""

from __future__ import annotations

import torch
from torch import nn
from torch._functorch import config as functorch

__all__ = ["compiled", "compiled_network"]

# Beyond mode="max-autotune", as the environment variables ENABLE_PERSISTENT_TMA_MATMUL,
# TORCHINDUCTOR_COORDINATE_DESCENT_TUNING and TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS would do.
_SETTINGS = {
    "triton.enable_persistent_tma_matmul": True,
    "coordinate_descent_tuning": True,
    "max_autotune_gemm_backends": "ATEN,TRITON,CPP",
    "combo_kernels": True,
    "prologue_fusion": True,
    # Every provider is timed under a CUDA graph as well (`graph_time`): one of Inductor's own
    # inside it cannot be captured, and would copy the inputs of one provider only.
    "triton.cudagraphs": False,
}


def compiled(module: nn.Module) -> nn.Module:
    """A layer under torch.compile for its exact shapes; the compiling happens at the first calls.

    max-autotune with everything that helps on CUDA. On a CPU the default mode: there it is only to
    show that all this runs.
    """
    # Without this a compiled backward can run only once per forward, and could not be timed alone.
    functorch.donated_buffer = False
    options = None
    if next(module.parameters()).is_cuda:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
        options = {**torch._inductor.list_mode_options("max-autotune"), **_SETTINGS}
    return _compiled(module, options)


def compiled_network(module: nn.Module) -> nn.Module:
    """A whole network, in the default mode: to try out each of its kernels takes many minutes."""
    functorch.donated_buffer = True
    return _compiled(module, None)


def _compiled(module: nn.Module, options: dict | None) -> nn.Module:
    torch._dynamo.reset()  # each case is a program of its own, not a recompilation of the last
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)
