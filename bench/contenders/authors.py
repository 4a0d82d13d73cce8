"""The authors' rule in our own words, and the same without branches: what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.nn import functional as F

_RESET_RATIO = 0.01


class _BinaryStep(torch.autograd.Function):
    """The step with the paper's long-tailed derivative."""

    @staticmethod
    def forward(ctx, margin: Tensor) -> Tensor:
        ctx.save_for_backward(margin)
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        distance = ctx.saved_tensors[0].abs()
        slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.full_like(distance, 0.4))
        return grad * torch.where(distance > 1, torch.zeros_like(slope), slope)


def _mask(weight: Tensor, threshold: Tensor) -> Tensor:
    by_row = threshold.view(-1, *[1] * (weight.dim() - 1))
    return _BinaryStep.apply(weight.abs() - by_row).to(weight.dtype)


def authors_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """Mask a weight [N, ...]; the host decides whether its thresholds [N] are zeroed."""
    mask = _mask(weight, threshold)
    if mask.sum() / mask.numel() <= _RESET_RATIO:
        with torch.no_grad():
            threshold.zero_()
        mask = _mask(weight, threshold)
    return weight * mask


def branch_free_masked_weight(weight: Tensor, threshold: Tensor) -> Tensor:
    """Mask as `authors_masked_weight`, decided on the device; a reset is not written back."""
    by_row = threshold.detach().view(-1, *[1] * (weight.dim() - 1))
    kept = (weight.detach().abs() > by_row).sum(dtype=torch.float32)
    zero = torch.where(kept / weight.numel() <= _RESET_RATIO, -threshold.detach(), 0.0)
    return weight * _mask(weight, threshold + zero)


def _layer(kind: type[nn.Module], masked_weight: Callable[..., Tensor]) -> type[nn.Module]:
    class Masked(kind):
        """Has a threshold for each row, at least float32, so that all contenders prune alike."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.add_threshold_()

        def add_threshold_(self) -> None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self.threshold = nn.Parameter(self.weight.new_zeros(len(self.weight), dtype=dtype))

        def forward(self, input: Tensor) -> Tensor:
            weight = masked_weight(self.weight, self.threshold)
            if kind is nn.Linear:
                return F.linear(input, weight, self.bias)
            return self._conv_forward(input, weight, self.bias)

    return Masked


# The paper's layers as their authors run them: eager autograd and a host decision per forward.
AuthorsLinear = _layer(nn.Linear, authors_masked_weight)
AuthorsConv2d = _layer(nn.Conv2d, authors_masked_weight)
# The same with the decision on the device, which torch.compile can take whole.
BranchFreeLinear = _layer(nn.Linear, branch_free_masked_weight)
BranchFreeConv2d = _layer(nn.Conv2d, branch_free_masked_weight)


def convert_(model: nn.Module, linear: type = AuthorsLinear, conv: type = AuthorsConv2d):
    """Convert a model in place, but no embedding's weight; raises TypeError for recurrent ones."""
    shared = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for layer in model.modules():
        if isinstance(layer, nn.RNNBase):
            raise TypeError("the baselines have no recurrent layers; compare with dense")
        kind = {nn.Linear: linear, nn.Conv2d: conv}.get(type(layer))
        if kind is not None and id(layer.weight) not in shared:
            layer.__class__ = kind
            layer.add_threshold_()
    return model


convert_branch_free_ = partial(convert_, linear=BranchFreeLinear, conv=BranchFreeConv2d)


def _thresholds(model: nn.Module) -> list[Tensor]:
    return [layer.threshold for layer in model.modules() if hasattr(layer, "add_threshold_")]


def parameter_groups(model: nn.Module) -> list[dict]:
    """Return a model's parameters in two groups: thresholds have no weight decay."""
    thresholds = _thresholds(model)
    ids = set(map(id, thresholds))
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": others}, {"params": thresholds, "weight_decay": 0.0}]


def authors_regularization(model: nn.Module) -> Tensor:
    """Add up exp(-t) layer by layer, as the authors do."""
    return sum(torch.exp(-threshold).sum() for threshold in _thresholds(model))


# How baselines and our own layers are compiled, beyond mode="max-autotune": all that helps on CUDA.
_SETTINGS = {"triton.enable_persistent_tma_matmul": True, "coordinate_descent_tuning": True}
_SETTINGS |= {"max_autotune_gemm_backends": "ATEN,TRITON,CPP", "combo_kernels": True}
# Every contender is timed under a CUDA graph as well (`graph_time`): one of Inductor's own inside
# it cannot be captured, and would copy the inputs of one contender only.
_SETTINGS |= {"prologue_fusion": True, "triton.cudagraphs": False}


def compiled(module: nn.Module, tune: bool) -> nn.Module:
    """Compile a module for its exact shapes; the compiling happens at the first calls.

    With `tune`, each kernel is tuned on CUDA, which takes minutes for a whole network.
    """
    # Else a compiled backward can run only once per forward, and could not be timed alone.
    functorch.donated_buffer = not tune
    options = None
    if tune and next(module.parameters()).is_cuda:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
        options = {**torch._inductor.list_mode_options("max-autotune"), **_SETTINGS}
    torch._dynamo.reset()  # each case is a program of its own, not a recompilation of the last
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)
