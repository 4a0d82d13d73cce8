"""Who streams through a whole model's weights: functions that make the calls to time, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import dst_kernels
from dst_kernels import reference
from dst_kernels.backends import implementation

from .correctness import distance
from .errors import WrongResultError
from .list_problem import ListProblem
from .model_providers import deferred_optimizer
from .models import ADAMW, SGD
from .training import AT_REST, LEARNING, Hyper, torch_optimizer

__all__ = ["LIST_PASSES", "LIST_PROVIDERS", "PACK", "POST", "ListProvider"]

PACK, POST = "pack", "post"
LIST_PASSES = (PACK, POST, SGD, ADAMW)

_LARGEST_ERROR = 1e-4  # of the size of what is right, in float32
_SPARED = 16  # weights that a rounding may take to the other side of their threshold
_RESET_RATIO = 0.01

Call = Callable[[], object]


@dataclass(frozen=True)
class ListProvider:
    """A contender.

    Args:
        name: its name in results and on the command line.
        calls: for each pass, what makes the call to time from the problem.
        verify: raises WrongResultError where a call of the pass is not right; None: never asked.
    """

    name: str
    calls: dict[str, Callable[[ListProblem], Call]]
    verify: Callable[[str, ListProblem], None] | None = None
    compiled: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(self.calls)


# -- dense layers under autocast ---------------------------------------------------------------


def _cast_weights(problem: ListProblem) -> Call:
    cast = [weight.to(problem.mode.compute) for weight in problem.weights]
    return lambda: torch._foreach_copy_(cast, problem.weights)


def _cast_grads(problem: ListProblem) -> Call:
    cast = [grad.to(problem.mode.weight) for grad in problem.grads]
    return lambda: torch._foreach_copy_(cast, problem.grads)


def _torch_step(kind: str) -> Callable[[ListProblem], Call]:
    def call(problem: ListProblem) -> Call:
        model = problem.network(lambda dense: dense)
        for layer, grad in zip(model.layers, problem.grads, strict=True):
            layer.weight.grad = grad.to(layer.weight.dtype)
        optimizer = torch_optimizer(kind, AT_REST, problem.device, model.parameters())
        optimizer.step()
        return optimizer.step

    return call


# -- ours --------------------------------------------------------------------------------------


def _pack(problem: ListProblem) -> Call:
    function = implementation("auto", problem.device, "masked_weights")
    count = len(problem.weights)
    arguments = problem.weights, problem.thresholds, [_RESET_RATIO] * count, [True] * count
    return lambda: function(*arguments, problem.mode.compute)


def _post(problem: ListProblem) -> Call:
    function = implementation("auto", problem.device, "masked_weights_backward")
    count = len(problem.weights)
    arguments = problem.grads, problem.weights, problem.thresholds
    return lambda: function(*arguments, ["long_tailed"] * count, [True] * count)


def _trained(
    problem: ListProblem, kind: str, hyper: Hyper, backend: str
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After a first step, which is when the optimizer's state is made."""
    config = dst_kernels.SparsifyConfig.paper(backend=backend)
    model = problem.network(lambda dense: dst_kernels.sparsify_(dense, config))
    optimizer = deferred_optimizer(kind, model, hyper, backend)
    problem.backward(model)
    optimizer.step()
    return model, optimizer


def _our_step(kind: str) -> Callable[[ListProblem], Call]:
    return lambda problem: _trained(problem, kind, AT_REST, "auto")[1].step


def _verify(name: str, problem: ListProblem) -> None:
    if name == PACK:
        _verify_pack(problem)
    elif name == POST:
        _verify_post(problem)
    else:
        _verify_step(name, problem)


def _verify_pack(problem: ListProblem) -> None:
    masked, _ = _pack(problem)()
    for i, (weight, threshold) in enumerate(zip(problem.weights, problem.thresholds, strict=True)):
        right = reference.masked_weight(weight, threshold, _RESET_RATIO, problem.mode.compute)[0]
        if not torch.equal(masked[i], right):
            raise WrongResultError(f"masked weight {i} is not what the reference makes")


def _verify_post(problem: ListProblem) -> None:
    results = zip(*_post(problem)(), strict=True)
    operands = zip(problem.grads, problem.weights, problem.thresholds, strict=True)
    for i, (pair, (grad, weight, threshold)) in enumerate(zip(results, operands, strict=True)):
        right = reference.masked_weight_backward(
            grad.double(), weight.double(), threshold.double(), "long_tailed", True
        )
        for what, mine, exact in zip(("weight", "threshold"), pair, right, strict=True):
            _check(f"gradient of {what} {i}", mine.double(), exact)


def _verify_step(kind: str, problem: ListProblem) -> None:
    """Two steps against those of the reference.

    Of each weight but a few numbers: after the first step a rounding decides on which side of their
    threshold they are, and so about their gradient.
    """
    moved = []
    for backend in ("auto", "reference"):
        model, optimizer = _trained(problem, kind, LEARNING[kind], backend)
        optimizer.step()
        starts = zip(problem.weights, problem.thresholds, strict=True)
        moved.append(
            [
                (layer.weight.double() - weight, layer.threshold.double() - threshold)
                for layer, (weight, threshold) in zip(model.layers, starts, strict=True)
            ]
        )
    for i, pairs in enumerate(zip(*moved, strict=True)):
        (mine, of_threshold), (right, exact) = pairs
        furthest = (
            (mine - right).abs().nan_to_num(0.0, 0.0).flatten().topk(min(_SPARED, mine.numel()))
        )
        mine = mine.flatten().index_copy(0, furthest.indices, right.flatten()[furthest.indices])
        _check(f"step of weight {i}", mine, right.flatten())
        _check(f"step of threshold {i}", of_threshold, exact)


def _check(what: str, actual: torch.Tensor, right: torch.Tensor) -> None:
    error = distance(actual, right)
    if not error <= _LARGEST_ERROR:  # NaN is wrong, too
        raise WrongResultError(f"{what}: error {error:.3e} where {_LARGEST_ERROR} is allowed")


LIST_PROVIDERS = (
    ListProvider(
        "dense",
        {
            PACK: _cast_weights,
            POST: _cast_grads,
            SGD: _torch_step(SGD),
            ADAMW: _torch_step(ADAMW),
        },
    ),
    ListProvider(
        "auto",
        {PACK: _pack, POST: _post, SGD: _our_step(SGD), ADAMW: _our_step(ADAMW)},
        _verify,
    ),
)
