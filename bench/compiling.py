"""How the compiled baselines are compiled: everything that helps them is on."""

from __future__ import annotations

import torch
from torch import nn
from torch._functorch import config as functorch

__all__ = ["compiled"]

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
    """`module` under torch.compile for its exact shapes; the compiling happens at the first calls.

    max-autotune on CUDA. On a CPU the default mode: there it is only to show that all this runs.
    """
    # Without this a compiled backward can run only once per forward, and could not be timed alone.
    functorch.donated_buffer = False
    torch._dynamo.reset()  # each case is a program of its own, not a recompilation of the last
    options = None
    if next(module.parameters()).is_cuda:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
        options = {**torch._inductor.list_mode_options("max-autotune"), **_SETTINGS}
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)
