"""Single layers: linear ones and convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dst_kernels.nn import MaskedConv2d, MaskedLinear

from ..cases import FP64, LayerCase
from .authors import AuthorsConv2d, AuthorsLinear, BranchFreeConv2d, BranchFreeLinear, compiled
from .work import PASSES, PIECES, Contender, Data, Prepared, Work, thresholds_for


class Problem(Data):
    """A layer's data: input and gradient of the output in the compute dtype, and its parameters.

    `bias` is None but for a linear layer; thresholds are float32.
    """

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        super().__init__(case, device)
        weight, compute = self.mode.weight, self.mode.compute
        of_input, of_weight, of_output = case.shapes
        self.weight = self.draw(of_weight, weight, case.K**-0.5)
        self.threshold = thresholds_for(self.weight, case.remaining_ratio)
        self.input = self.draw(of_input, compute)
        self.bias = self.draw((case.N,), weight, 0.1) if case.op == "linear" else None
        self.grad_output = self.draw(of_output, compute)


class _LayerWork(Work):
    """A module that is called with the problem's input, its parameters loaded."""

    def __init__(self, problem: Problem, module: nn.Module) -> None:
        self._problem, self._module = problem, module
        self._input = problem.input.detach()  # a leaf that shares the data
        self._tensors = {"input": self._input}
        for name, parameter in module.named_parameters():
            self._tensors[name.removeprefix("_orig_mod.")] = parameter  # of a compiled module
        self._autocast = functools.partial(problem.mode.autocast, problem.device.type)

    def prepare(self, name: str) -> Prepared:
        single = {"grad_input": ("input",), "grad_weight": ("weight", "threshold")}
        sources = self._require(single.get(name, self._tensors))
        if name == "forward":  # builds the graph, as training does; one autocast region for all
            return Prepared(lambda: self._module(self._input), self._autocast)
        if name == "forward_backward":
            return Prepared(lambda: self._gradients(self._forward(), sources))
        # One graph, made in the first call, so that also in a capture both run on the side stream:
        # autograd runs a node's backward where its forward ran.
        output = functools.cache(self._forward)
        return Prepared(lambda: self._gradients(output(), sources, again=True))

    def results(self, replay: Callable | None = None) -> dict[str, Tensor]:
        sources = self._require(self._tensors)
        output = self._forward()
        grads = zip(self._tensors, self._gradients(output, sources), strict=True)
        return {"output": output.detach(), **{n: grad for n, grad in grads if grad is not None}}

    def saved_bytes(self) -> int:
        known = {tensor.untyped_storage()._cdata for tensor in self._require(self._tensors)}
        saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._forward()
        return sum(saved[one].untyped_storage().nbytes() for one in saved.keys() - known)

    def _forward(self) -> Tensor:
        with self._autocast():
            return self._module(self._input)

    def _gradients(self, output: Tensor, sources: list[Tensor], again: bool = False) -> tuple:
        grad = self._problem.grad_output
        return torch.autograd.grad(output, sources, grad, retain_graph=again, allow_unused=True)

    def _require(self, names: Iterable[str]) -> list[Tensor]:
        for name, tensor in self._tensors.items():
            tensor.requires_grad_(name in names)
        return [tensor for tensor in self._tensors.values() if tensor.requires_grad]


def layer(kind: type[nn.Module], compile: bool = False, alone: bool = False, **options) -> Callable:
    """Return what makes a layer of that class with the case's parameters.

    With `alone` every operand is in the compute dtype beforehand: the library's product alone.
    """

    def make(problem: Problem) -> Work:
        factory = {"device": problem.device, "dtype": problem.weight.dtype}
        module = kind(*problem.case.arguments, **factory, **options)
        module.to(memory_format=torch.channels_last)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(getattr(problem, name))
        if alone:
            module.to(problem.mode.compute)
        return _LayerWork(problem, compiled(module, tune=True) if compile else module)

    return make


def _contenders(product: str, dense: type, masked: type, authors: type, plain: type) -> tuple:
    """Return the contenders of a kind of layer; `product` names the library's product alone."""
    pieces = PASSES + PIECES
    return (
        Contender("dense", layer(dense), pieces, masked=False),
        Contender(product, layer(dense, alone=True), ("forward", *PIECES), masked=False),
        Contender("auto", layer(masked)),
        Contender("fused", layer(masked, path="fused"), pieces),
        Contender("packed", layer(masked, path="packed"), pieces),
        Contender("mixed", layer(masked, path="mixed")),
        Contender("dst_eager", layer(authors), graphable=False),
        Contender("dst_eager_branchfree", layer(plain)),
        Contender("dense_compiled", layer(dense, compile=True), masked=False, compiled=True),
        Contender("dst_compiled", layer(plain, compile=True), compiled=True),
    )


def _reference(masked: type, plain: type) -> Contender:
    """Return our reference in float64, and what errors plain PyTorch makes in other dtypes."""
    exact = layer(masked, backend="reference", path="packed")
    return Contender("reference", lambda p: (exact if p.mode is FP64 else layer(plain))(p))


LINEAR = _contenders("gemm", nn.Linear, MaskedLinear, AuthorsLinear, BranchFreeLinear)
CONV = _contenders("conv", nn.Conv2d, MaskedConv2d, AuthorsConv2d, BranchFreeConv2d)
REFERENCE_LINEAR = _reference(MaskedLinear, BranchFreeLinear)
REFERENCE_CONV = _reference(MaskedConv2d, BranchFreeConv2d)
