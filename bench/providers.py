"""Who is measured: functions that build a module for a problem, by name.

A function raises where its provider cannot run; the message is recorded as the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import dst_kernels
import dst_kernels.nn as dst_nn

from .baselines import (
    AuthorsLinear,
    BranchFreeLinear,
    authors_masked_weight,
    authors_regularization,
    branch_free_masked_weight,
)
from .compiling import compiled
from .problem import Problem, WeightOnly

__all__ = ["LINEAR_PROVIDERS", "PASSES", "PIECES", "WEIGHT_PROVIDERS", "Provider"]

PASSES = ("forward", "backward", "forward_backward", "step")
PIECES = ("grad_input", "grad_weight")


@dataclass(frozen=True)
class Provider:
    """A contender.

    Args:
        name: its name in results and on the command line.
        build: makes its module, parameters loaded; may raise anything that keeps it from running.
        regularization: of a DST provider, the regulariser a training step adds; None for dense.
        compiled: goes through torch.compile: measured after all others, as compiling takes long.
        graphable: can be captured in a CUDA graph.
        passes: what is measured of it.
    """

    name: str
    build: Callable[[Problem], nn.Module]
    regularization: Callable[[nn.Module], Tensor] | None = None
    compiled: bool = False
    graphable: bool = True
    passes: tuple[str, ...] = PASSES

    @property
    def masked(self) -> bool:
        """Whether it computes the masked op, and is verified against the reference."""
        return self.regularization is not None


# -- linear ------------------------------------------------------------------------------------


def _linear(layer: type[nn.Linear], **options) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        N, K = problem.weight.shape
        factory = {"device": problem.device, "dtype": problem.weight.dtype}
        return problem.load_(layer(K, N, **factory, **options))

    return build


def _ours(path: str) -> Callable[[Problem], nn.Module]:
    return _linear(dst_nn.MaskedLinear, path=path)


def _compiled(build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    return lambda problem: compiled(build(problem))


def _forced_prologue(problem: Problem) -> nn.Module:
    from .forced_prologue import ForcedPrologueLinear

    return compiled(_linear(ForcedPrologueLinear)(problem))


def _product_alone(problem: Problem) -> nn.Module:
    """The library's matrix product with every operand in the compute dtype beforehand."""
    N, K = problem.weight.shape
    factory = {"device": problem.device, "dtype": problem.mode.compute}
    return problem.load_(nn.Linear(K, N, **factory))


_regularization = dst_kernels.sparse_regularization
_theirs = authors_regularization

LINEAR_PROVIDERS = (
    Provider("dense", _linear(nn.Linear), passes=PASSES + PIECES),
    Provider("gemm", _product_alone, passes=("forward", *PIECES)),
    Provider("auto", _ours("auto"), _regularization),
    Provider("fused", _ours("fused"), _regularization, passes=PASSES + PIECES),
    Provider("packed", _ours("packed"), _regularization, passes=PASSES + PIECES),
    Provider("mixed", _ours("mixed"), _regularization),
    Provider("dst_eager", _linear(AuthorsLinear), _theirs, graphable=False),
    Provider("dst_eager_branchfree", _linear(BranchFreeLinear), _theirs),
    Provider("dense_compiled", _compiled(_linear(nn.Linear)), compiled=True),
    Provider("dst_compiled", _compiled(_linear(BranchFreeLinear)), _theirs, compiled=True),
    Provider("dst_compiled_forced_prologue", _forced_prologue, _theirs, compiled=True),
)

# -- the weight side alone ---------------------------------------------------------------------


def _cast(problem: Problem) -> nn.Module:
    """What dense autocast does on the weight side."""
    return WeightOnly(problem, lambda weight, threshold: weight.to(problem.mode.compute))


def _masked(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        def cast(weight: Tensor, threshold: Tensor) -> Tensor:
            return function(weight, threshold).to(problem.mode.compute)

        return WeightOnly(problem, cast)

    return build


def _our_masked_weight(problem: Problem) -> nn.Module:
    def function(weight: Tensor, threshold: Tensor) -> Tensor:
        return dst_kernels.functional.masked_weight(weight, threshold, dtype=problem.mode.compute)

    return WeightOnly(problem, function)


_branch_free = _masked(branch_free_masked_weight)
# Without input and loss there is no step.
_weight_provider = functools.partial(Provider, passes=("forward", "backward"))

WEIGHT_PROVIDERS = (
    _weight_provider("dense", _cast),
    _weight_provider("auto", _our_masked_weight, _regularization),
    _weight_provider("dst_eager", _masked(authors_masked_weight), _theirs, graphable=False),
    _weight_provider("dst_eager_branchfree", _branch_free, _theirs),
    _weight_provider("dst_compiled", _compiled(_branch_free), _theirs, compiled=True),
)
