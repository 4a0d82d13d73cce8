"""Whether a contender computes what the reference computes: asked before anything is timed.

Layers and weights are held against the reference in float64, on the very data that is timed; a
training by five steps of a small model of the same kind, with all that a step does switched up. An
error may be twice that of plain PyTorch in the dtype at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cases import FP64, MODES, Case, Mode, ModelCase
from ..contenders import REFERENCES, problem_of
from ..contenders.work import Contender, Work
from ..results import WrongResultError
from .timing import replayed

_SAMPLES = 256
_FP32 = MODES["fp32"]

# A training's relative error may be this much more: one weight may be on the other side of its
# threshold, but in float64.
_FLOORS = {torch.float64: 1e-9, torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.02}

Results = dict[str, Tensor]


class Expectation:
    """What the contenders of a case have to compute; making one raises what data do not fit."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.problem = problem_of(case, device)
        self.turns: dict[str, tuple[Callable, Callable]] = {}  # by name: steps to time, and `add`
        self._known: dict[tuple[Mode, Contender], list[Results]] = {}

    def verified(self, contender: Contender) -> Work:
        """Return a contender's work, ready to be timed; raises WrongResultError if it is off."""
        if not contender.masked:
            return contender.make(self.problem)
        if not isinstance(self.case, ModelCase):
            work = contender.make(self.problem)  # what is verified itself: compiling takes long
            self._check_layer(work.results())
            return work
        # Where kernels of ours must serve it.
        modes = [FP64] * (self.device.type == "cpu" and contender.exact)
        modes += [_FP32, self.case.mode]
        for mode in [_FP32] if contender.compiled else dict.fromkeys(modes):  # each compiles anew
            self._check_training(contender, mode)
        return contender.make(self.problem)

    def verify_graph(self, contender: Contender) -> None:
        """Compare replays of a training's graph, in float32; raises what the capture raises."""
        if contender.masked and not contender.compiled:
            self._check_training(contender, _FP32, replayed)

    def _right(self, mode: Mode, reference: Contender | None = None) -> list[Results]:
        """Return the results of a reference, by default the op's, in float64 and in a mode."""
        known = mode, reference or REFERENCES[self.case.op]
        if known not in self._known:
            whole = isinstance(self.case, ModelCase)
            problem = self.problem.small(mode) if whole else self.problem
            self._known[known] = []
            for each in (problem.exact(), problem):
                tf32 = _TF32Products() if each.mode.tf32 else contextlib.nullcontext()
                with each.mode.precision(), tf32:
                    results = known[1].make(each).results()
                self._known[known].append(results if whole else _sampled(results))
        return self._known[known]

    def _check_layer(self, actual: Results) -> None:
        for name, tensor in actual.items():
            if not bool(tensor.isfinite().all()):
                raise WrongResultError(f"{name} is not finite everywhere")
        exact, plain = self._right(self.case.mode)
        actual = _sampled(actual)
        for name in exact:
            if name not in actual:
                raise WrongResultError(f"{name} has no gradient")
            check_close(name, actual[name], plain[name], exact[name])

    def _check_training(self, contender: Contender, mode: Mode, replay: Callable | None = None):
        exact, plain = self._right(mode, contender.reference)
        with mode.precision():
            actual = contender.make(self.problem.small(mode)).results(replay)
        for name, right in exact.items():
            error = _distance(actual[name], right)
            allowed = 2 * _distance(plain[name], right) + _FLOORS[mode.compute]
            if not error <= allowed:  # NaN is wrong, too
                when = f"after a few steps in {mode.name}{', replayed' * bool(replay)}"
                off = f"error {error:.3e} where {allowed:.3g} is allowed"
                raise WrongResultError(f"{name} {when}: {off}")


def check_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise WrongResultError where `actual` is over twice as far from `exact` as `plain` is."""
    if actual.dtype != plain.dtype or actual.shape != plain.shape:
        found, expected = (f"{one.dtype} {list(one.shape)}" for one in (actual, plain))
        raise WrongResultError(f"{name} is {found}, expected {expected}")
    # A floor, as `plain` may be right by chance: half a unit in the last place of the dtype, and a
    # few roundings of the float32 arithmetic before it.
    working, limits = torch.promote_types(actual.dtype, torch.float32), torch.finfo(actual.dtype)
    floor = limits.eps / 2 * exact.abs() + 8 * torch.finfo(working).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + floor + limits.smallest_normal * limits.eps
    error = (actual.double() - exact).abs()
    wrong = ~(error <= allowed)  # NaN is wrong, too
    if bool(wrong.any()):
        worst = (error - allowed).nan_to_num(nan=torch.inf).argmax()
        raise WrongResultError(
            f"{name}: error {error.flatten()[worst].item():.3e} where "
            f"{allowed.flatten()[worst].item():.3e} is allowed, in {int(wrong.sum())} of "
            f"{wrong.numel()} compared elements"
        )


def _distance(actual: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference over that of `exact`; inf for other shapes."""
    if actual.shape != exact.shape:
        return torch.inf
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _sampled(results: Results) -> Results:
    """Return up to 256 rows of each, the first and the last too: a big case stays affordable."""
    found = {}
    for name, tensor in results.items():
        rows = torch.randperm(len(tensor), generator=torch.Generator().manual_seed(1))[:_SAMPLES]
        rows[0], rows[-1] = 0, len(tensor) - 1
        found[name] = tensor[rows.to(tensor.device)] if len(tensor) > _SAMPLES else tensor
    return found


# Where each product has its operands.
_FACTORS = {"mm": (0, 1), "addmm": (1, 2), "convolution": (0, 1), "convolution_backward": (0, 1, 2)}


class _TF32Products(TorchDispatchMode):
    """Makes float32 products of what tensor cores see of their operands, 19 bits of 32.

    torch's libraries may round where the tensor cores cut off, and leave some sizes exact.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        for i in _FACTORS.get(func.overloadpacket.__name__, ()):
            args[i] = (args[i].view(torch.int32) & -(1 << 13)).view(torch.float32)
        return func(*args, **(kwargs or {}))
