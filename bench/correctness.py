"""Whether a provider computes what the reference computes: asked before anything is timed.

The provider runs the whole case. Its results are compared with the reference in float64 on some
tokens (outputs, gradients of the input) and some rows of the weight (gradients of parameters): each
is determined by a much smaller problem, so that this costs little however big the case is. A
convolution's tokens are its images, its rows the filters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dst_kernels.functional as dst

from .baselines import branch_free_masked_weight
from .cases import CONV, ConvCase, LayerCase
from .errors import WrongResultError
from .passes import gradients
from .problem import Problem

__all__ = ["Expectation", "check_close", "distance"]

_SAMPLES = 64

aten = torch.ops.aten

# Where each product has its operands.
_FACTORS = {
    **{aten.mm.default: (0, 1), aten.addmm.default: (1, 2)},
    **{aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2)},
}

Results = dict[str, Tensor]


def check_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise WrongResultError where `actual` is over twice as far from `exact` as `plain` is.

    `exact` is float64, `plain` what PyTorch's own dense operations give in the dtype at hand. On
    top comes a floor for results that those happen to hit: half a unit in the last place of the
    dtype, and a few roundings of the float32 arithmetic before it.
    """
    if actual.dtype != plain.dtype or actual.shape != plain.shape:
        raise WrongResultError(
            f"{name} is {actual.dtype} {list(actual.shape)}, "
            f"expected {plain.dtype} {list(plain.shape)}"
        )
    working = torch.promote_types(actual.dtype, torch.float32)
    limits = torch.finfo(actual.dtype)
    floor = (
        limits.eps / 2 * exact.abs()
        + 8 * torch.finfo(working).eps * exact.abs().max()
        + limits.smallest_normal * limits.eps
    )
    allowed = 2 * (plain.double() - exact).abs().max() + floor
    error = (actual.double() - exact).abs()
    wrong = ~(error <= allowed)  # NaN is wrong, too
    if bool(wrong.any()):
        worst = (error - allowed).nan_to_num(nan=torch.inf).argmax()
        raise WrongResultError(
            f"{name}: error {error.flatten()[worst].item():.3e} where "
            f"{allowed.flatten()[worst].item():.3e} is allowed, in {int(wrong.sum())} of "
            f"{wrong.numel()} compared elements"
        )


def distance(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, over that of `exact`; infinite for other shapes."""
    if actual.shape != exact.shape:
        return torch.inf
    return ((actual - exact).norm() / exact.norm()).item()


class Expectation:
    """What every DST provider has to compute for a problem, on sampled tokens and rows."""

    def __init__(self, problem: Problem) -> None:
        generator = torch.Generator().manual_seed(1)
        self._problem = problem
        self._rows = _rows(problem.case, generator).to(problem.device)
        self._tokens = _sample(problem.grad_output.shape[0], generator).to(problem.device)
        self._exact = self._evaluate(_exact, torch.float64)
        with _TF32Products() if problem.mode.tf32 else contextlib.nullcontext():
            self._plain = self._evaluate(_plain, None)

    def verify(self, module: nn.Module) -> None:
        """Run forward and backward of a provider's module; raise WrongResultError if it is off."""
        actual = gradients(module, self._problem)
        for name, tensor in actual.items():
            if not bool(tensor.isfinite().all()):
                raise WrongResultError(f"{name} is not finite everywhere")
        for name in self._exact:
            if name not in actual:
                raise WrongResultError(f"{name} has no gradient")
            sampled = actual[name][self._sampled(name)]
            check_close(name, sampled, self._plain[name], self._exact[name])

    def _sampled(self, name: str) -> Tensor:
        by_token = name == "input" or (name == "output" and self._problem.inputs)
        return self._tokens if by_token else self._rows

    def _evaluate(self, forward: Callable[..., Tensor], dtype: torch.dtype | None) -> Results:
        """Output and gradients on the samples, by `forward` on operands in `dtype` (None: own)."""
        problem, rows, tokens = self._problem, self._rows, self._tokens

        def convert(tensor: Tensor) -> Tensor:
            return tensor if dtype is None else tensor.to(dtype)

        def run(operands: Results, grad: Tensor, wanted: list[str]) -> Results:
            leaves = {key: convert(tensor).detach() for key, tensor in operands.items()}
            for key in wanted:
                leaves[key].requires_grad_(True)
            output = forward(problem, **leaves)
            sources = [leaves[key] for key in wanted]
            grads = torch.autograd.grad(output, sources, convert(grad))
            return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}

        everything = {"weight": problem.weight, "threshold": problem.threshold}
        if problem.bias is not None:
            everything["bias"] = problem.bias
        of_rows = {key: tensor[rows] for key, tensor in everything.items()}
        if not problem.inputs:
            return run(of_rows, problem.grad_output[rows], list(of_rows))
        (input,) = problem.inputs
        by_row = run({"input": input, **of_rows}, problem.grad_output[:, rows], list(of_rows))
        by_token = run(
            {"input": input[tokens], **everything}, problem.grad_output[tokens], ["input"]
        )
        return {**by_row, **by_token}  # the output is the tokens'


class _TF32Products(TorchDispatchMode):
    """Float32 products of what tensor cores see of their operands, 19 bits of 32.

    torch's libraries may round where the tensor cores cut off, and leave some sizes exact.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        for i in _FACTORS.get(func, ()):
            args[i] = (args[i].view(torch.int32) & -(1 << 13)).view(torch.float32)
        return func(*args, **(kwargs or {}))


def _rows(case: LayerCase, generator: torch.Generator) -> Tensor:
    """All where each has an input of its own: such weights are small."""
    if isinstance(case, ConvCase) and case.groups > 1:
        return torch.arange(case.N)
    return _sample(case.N, generator)


def _sample(size: int, generator: torch.Generator) -> Tensor:
    """Up to 64 sorted indices below `size`, the first and the last among them."""
    if size <= _SAMPLES:
        return torch.arange(size)
    inner = 1 + torch.randperm(size - 2, generator=generator)[: _SAMPLES - 2]
    return torch.cat([torch.tensor([0, size - 1]), inner]).sort().values


def _exact(
    problem: Problem,
    weight: Tensor,
    threshold: Tensor,
    input: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    # The guard looks at the whole weight, of which this may be a part; no case triggers it.
    options = {"reset_ratio": None, "backend": "reference"}
    if input is None:
        return dst.masked_weight(weight, threshold, **options)
    if problem.case.op == CONV:
        options |= problem.case.geometry
        return dst.masked_conv2d(input, weight, threshold, bias, **options)
    return dst.masked_linear(input, weight, threshold, bias, **options)


def _plain(
    problem: Problem,
    weight: Tensor,
    threshold: Tensor,
    input: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    masked = branch_free_masked_weight(weight, threshold)
    if input is None:
        return masked.to(problem.mode.compute)
    with problem.mode.autocast(problem.device.type):
        if problem.case.op == CONV:
            return nn.functional.conv2d(input, masked, bias, **problem.case.geometry)
        return nn.functional.linear(input, masked, bias)
