"""What is timed of a module: forward, backward, both, a whole step, and single gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .problem import Problem
from .providers import Provider

__all__ = ["Prepared", "gradients", "prepare", "saved_bytes"]

_ALPHA = 1e-4  # of the regulariser in a step; any number costs the same
_WITHOUT_OTHERS = {"grad_input": ("input",), "grad_weight": ("weight", "threshold")}


@dataclass(frozen=True)
class Prepared:
    """A pass ready to be repeated: `call` inside of `surroundings()`.

    A first call may do more than the later ones.
    """

    call: Callable[[], object]
    surroundings: Callable[[], AbstractContextManager] = nullcontext


def prepare(name: str, provider: Provider, module: nn.Module, problem: Problem) -> Prepared:
    """The pass `name` of a provider's module; switches requires_grad of its parameters to suit.

    "forward" builds the graph, as training does; its autocast region is entered once around the
    loop. "backward", "grad_input" (only the input requires grad) and "grad_weight" (only weight
    and threshold) repeat one graph. "forward_backward" is both, for all gradients. "step" adds the
    regulariser for DST providers and AdamW (fused on CUDA) with rate 0, which leaves the case as
    it is.
    """
    autocast = lambda: problem.mode.autocast(problem.device.type)  # noqa: E731
    named = _tensors(module, problem)
    wanted = _WITHOUT_OTHERS.get(name, tuple(named))
    for key, tensor in named.items():
        tensor.requires_grad_(key in wanted)
    sources = [tensor for key, tensor in named.items() if key in wanted]
    inputs = [named["input"]] if problem.inputs else []
    grad_output = problem.grad_output

    def forward() -> Tensor:
        with autocast():
            return module(*inputs)

    def gradient(output: Tensor, again: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output, sources, grad_output, retain_graph=again, allow_unused=True
        )

    if name == "forward":
        return Prepared(lambda: module(*inputs), autocast)
    if name == "forward_backward":
        return Prepared(lambda: gradient(forward(), again=False))
    if name == "step":
        return Prepared(_step(provider, module, problem, forward, inputs))
    output: list[Tensor] = []

    def backward() -> object:
        # In the first call, so that forward and backward run on one stream, also on the side
        # stream of a graph capture: autograd runs a node's backward where its forward ran.
        if not output:
            output.append(forward())
        return gradient(output[0], again=True)

    return Prepared(backward)


def _step(
    provider: Provider,
    module: nn.Module,
    problem: Problem,
    forward: Callable[[], Tensor],
    inputs: list[Tensor],
) -> Callable[[], None]:
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=problem.device.type == "cuda")
    regularization = provider.regularization

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for input in inputs:
            input.grad = None
        output = forward()
        if regularization is None:
            output.backward(problem.grad_output)
        else:
            penalty = _ALPHA * regularization(module)
            torch.autograd.backward([output, penalty], [problem.grad_output, None])
        optimizer.step()

    return step


def _tensors(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Input (a leaf that shares the problem's data) and parameters, by name."""
    inputs = {"input": problem.inputs[0].detach()} if problem.inputs else {}
    parameters = {
        name.removeprefix("_orig_mod."): parameter  # of a compiled module
        for name, parameter in module.named_parameters()
    }
    return {**inputs, **parameters}


def gradients(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """One forward and backward: "output" and the gradients of input and parameters, by name.

    Without what the output does not depend on.
    """
    named = _tensors(module, problem)
    for tensor in named.values():
        tensor.requires_grad_(True)
    with problem.mode.autocast(problem.device.type):
        output = module(*([named["input"]] if problem.inputs else []))
    sources = list(named.values())
    grads = torch.autograd.grad(output, sources, problem.grad_output, allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return {"output": output.detach(), **found}


def saved_bytes(module: nn.Module, problem: Problem) -> int:
    """Bytes that a forward saves for backward beside the input and the parameters."""
    named = _tensors(module, problem)
    for tensor in named.values():
        tensor.requires_grad_(True)
    known = {_storage(tensor) for tensor in named.values()}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved[_storage(tensor)] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        problem.mode.autocast(problem.device.type),
    ):
        module(*([named["input"]] if problem.inputs else []))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # which fake tensors have, too
