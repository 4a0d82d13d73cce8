"""Who is measured: functions that build a module for a problem, by name.

A function raises where its provider cannot run; the message is recorded as the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dst_kernels
import dst_kernels.nn as dst_nn

from .baselines import (
    AuthorsConv2d,
    AuthorsLinear,
    BranchFreeConv2d,
    BranchFreeLinear,
    authors_masked_weight,
    authors_regularization,
    branch_free_masked_weight,
)
from .compiling import compiled
from .problem import Problem, WeightOnly

__all__ = [
    "CONV_PROVIDERS",
    "LINEAR_PROVIDERS",
    "PASSES",
    "PIECES",
    "WEIGHT_PROVIDERS",
    "Provider",
]

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


# -- layers ------------------------------------------------------------------------------------

_regularization = dst_kernels.sparse_regularization
_theirs = authors_regularization


def _layer(kind: type[nn.Module], **options) -> Callable[[Problem], nn.Module]:
    def build(problem: Problem) -> nn.Module:
        factory = {"device": problem.device, "dtype": problem.weight.dtype}
        layer = kind(**problem.case.layer_options, **factory, **options)
        return problem.load_(layer.to(memory_format=torch.channels_last))

    return build


def _product_alone(dense: type[nn.Module]) -> Callable[[Problem], nn.Module]:
    """The library's product with every operand in the compute dtype beforehand."""
    build = _layer(dense)
    return lambda problem: build(problem).to(problem.mode.compute)


def _compiled(build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    return lambda problem: compiled(build(problem))


def _layer_providers(
    product: str,
    dense: type[nn.Module],
    masked: type[nn.Module],
    authors: type[nn.Module],
    branch_free: type[nn.Module],
) -> tuple[Provider, ...]:
    """`product`: the name of the library's product alone; then the layers to compare."""
    pieces = PASSES + PIECES
    return (
        Provider("dense", _layer(dense), passes=pieces),
        Provider(product, _product_alone(dense), passes=("forward", *PIECES)),
        Provider("auto", _layer(masked), _regularization),
        Provider("fused", _layer(masked, path="fused"), _regularization, passes=pieces),
        Provider("packed", _layer(masked, path="packed"), _regularization, passes=pieces),
        Provider("mixed", _layer(masked, path="mixed"), _regularization),
        Provider("dst_eager", _layer(authors), _theirs, graphable=False),
        Provider("dst_eager_branchfree", _layer(branch_free), _theirs),
        Provider("dense_compiled", _compiled(_layer(dense)), compiled=True),
        Provider("dst_compiled", _compiled(_layer(branch_free)), _theirs, compiled=True),
    )


def _forced_prologue(problem: Problem) -> nn.Module:
    from .forced_prologue import ForcedPrologueLinear

    return compiled(_layer(ForcedPrologueLinear)(problem))


LINEAR_PROVIDERS = (
    *_layer_providers("gemm", nn.Linear, dst_nn.MaskedLinear, AuthorsLinear, BranchFreeLinear),
    Provider("dst_compiled_forced_prologue", _forced_prologue, _theirs, compiled=True),
)

CONV_PROVIDERS = _layer_providers(
    "conv", nn.Conv2d, dst_nn.MaskedConv2d, AuthorsConv2d, BranchFreeConv2d
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
