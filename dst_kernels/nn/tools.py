"""Give tools that record, fuse, quantise or merge modules W * M, or say what to do first.

Such tools read parameters, types and names, not what a forward does. All that is here hangs on
what torch or a tool asks of a module on those occasions alone, so that a forward costs no more.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..reference.weight import recorded_masked_weight

if TYPE_CHECKING:
    from .module import MaskedModule
    from .weight import MaskedWeight

# What `torch.fx.Tracer.is_leaf_module` asks an instance for. Not the full name of a module of
# torch, which the compiler also looks at.
LEAF = {"__module__": "torch.nn"}


def recorded(part: MaskedWeight) -> Tensor:
    """Return W * M, made by operations of torch alone, for a tool that records these."""
    refuse_training(part.module)
    if part.fixed_mask is not None:
        return part.under_fixed_mask(part.weight)
    with warnings.catch_warnings():  # the shape of a weight is a constant
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        rows, limits = part.rows(part.weight), part.rows(part.threshold)
        pairs = zip(rows.chunk(part.matrices), limits.chunk(part.matrices), strict=True)
        ratio = part.module.masking.reset_ratio
        made = [recorded_masked_weight(*pair, ratio, rows.dtype)[0] for pair in pairs]
        return part.back(made[0] if len(made) == 1 else torch.cat(made), part.weight)


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError in training mode: what tools record has no gradients of W and t."""
    if module.training:
        raise RuntimeError(
            "torch.jit.trace, torch.export and ONNX record masked weights for inference only: call "
            "model.eval() first, or dst_kernels.finalize_(model) for a dense one"
        )


def recorded_if_traced(module: MaskedModule, name: str) -> Tensor | None:
    """Return `recorded` of a weight that a forward reads while torch.jit.trace runs, else None.

    Raises RuntimeError under torch.fx, which would keep the numbers of the moment.
    """
    if torch._C._get_tracing_state() is not None:
        return recorded(next(part for part in module.masked_weights() if part.name == name))
    if is_fx_symbolic_tracing():
        raise RuntimeError(
            f"torch.fx cannot record {name} of a {type(module).__name__}, which is masked while a "
            "forward reads it: make the module with that forward a leaf (Tracer.is_leaf_module), "
            "or call dst_kernels.finalize_(model) first"
        )
    return None


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Raise: torch.jit.script compiles Python code, and masked forwards are not such."""
    raise RuntimeError(
        "torch.jit.script cannot compile a masked model: call dst_kernels.finalize_(model) first, "
        "or use torch.jit.trace in evaluation mode"
    )


def refuse_quantizing(module: nn.Module, qconfig: Any) -> NoReturn:
    """Raise: torch.ao.quantization, which sets this attribute, would skip masked modules."""
    raise RuntimeError(
        f"a {type(module).__name__} cannot be quantized: torch.ao.quantization goes by a module's "
        "type and would leave it out. Call dst_kernels.finalize_(model) first"
    )


def answer(module: MaskedModule, name: str) -> Callable | None:
    """Return an attribute that masked modules have for some tools only; None: it is missing.

    * `fuse_conv_bn_eval` and `fuse_linear_bn_eval` of torch.nn.utils.fusion fold a BatchNorm into a
      deep copy: it is a dense one with W * M.
    * An adapter of peft asks its `base_layer` for a layer inside that. To merge itself into the
      weight there is refused: what is added would be masked, too.
    """
    if name == "__deepcopy__" and _is_called_by(
        lambda frame: frame.f_globals.get("__name__") == "torch.nn.utils.fusion"
    ):
        return lambda memo: copy.deepcopy(module.to_dense(), memo)
    if (
        name == "base_layer"
        and _is_called_by(lambda frame: frame.f_code.co_name == "merge")
        and _prunes(module)
    ):
        raise RuntimeError(
            "an adapter cannot be merged into a masked layer, which would mask weight + adapter: "
            "call dst_kernels.finalize_(model) first, then merge"
        )
    return None


_NEAR = 6  # frames: ours, the tool's, and those of a user's class between them


def _is_called_by(matches: Callable[[FrameType], bool]) -> bool:
    """Return whether one of the nearest callers of `answer` matches."""
    frame = sys._getframe(2)
    for _ in range(_NEAR):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if matches(frame):
            return True
    return False


@torch.no_grad()
def _prunes(module: MaskedModule) -> bool:
    parts = module.masked_weights()
    return any(part.fixed_mask is not None or bool(part.threshold.any()) for part in parts)
