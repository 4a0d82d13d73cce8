"""Whether a provider trains as the reference does: asked before its steps are timed.

A few steps of a small model of the same kind, with everything that a step does switched up: the
losses, and how far weights and thresholds moved, are compared with those of plain masked layers
and torch's optimizer in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .correctness import distance
from .errors import WrongResultError
from .model_providers import BRANCH_FREE, REFERENCE, ModelProvider
from .modes import MODES, Mode
from .timing import replayed
from .training import LEARNING, Setup, Training

__all__ = ["TrajectoryExpectation"]

_STEPS = 5
_BEFORE_CAPTURE = 2  # of them: optimizers make their state in the first
_BATCH = 16
_REMAINING = 0.5

_EXACT = Mode("fp64", torch.float64, torch.float64)

# Of the size of what is compared, beside twice the error of plain PyTorch. In float64 no mask
# differs; elsewhere one weight on another side of its threshold may.
_FLOORS = {torch.float64: 1e-9, torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class _Trajectory:
    """float64: the loss of each step; what was added to all weights, to all thresholds."""

    losses: Tensor
    weights: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, training: Training, under_graph: bool) -> _Trajectory:
        before = _parameters(training)
        results: Iterable[Tensor] = (training.step() for _ in range(_STEPS))
        if under_graph:
            results = replayed(training.step, _BEFORE_CAPTURE, _STEPS - _BEFORE_CAPTURE)
        losses = [training.value(result) for result in results]
        after = _parameters(training)
        moved = {name: after[name] - value for name, value in before.items()}
        both = [
            torch.cat([moved[n] for n in sorted(moved) if ("threshold" in n) == wanted])
            for wanted in (False, True)
        ]
        return cls(torch.tensor(losses, dtype=torch.float64), *both)


def _parameters(training: Training) -> dict[str, Tensor]:
    named = training.model.named_parameters()
    return {name: p.detach().double().flatten().clone() for name, p in named}


class TrajectoryExpectation:
    """What every DST provider has to do to a model.

    Args:
        setup: what is to be timed; its small model is what is checked.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = replace(
            setup,
            model=setup.about.small,
            batch=_BATCH,
            remaining_ratio=_REMAINING,
            hyper=LEARNING[setup.about.optimizer],
        )
        self._timed = setup.mode
        self._exact = self._run(REFERENCE, _EXACT)
        self._plain = {mode.name: self._run(BRANCH_FREE, mode) for mode in self.modes()}

    def verify(self, provider: ModelProvider) -> None:
        """Train in float32 and in the mode that is timed, on a CPU in float64, too.

        Raises WrongResultError where the provider is off. One that compiles is run in float32
        alone, as compiling takes long.
        """
        for mode in self.modes():
            if mode.name == "fp32" or not provider.compiled:
                self.compare(provider, mode)

    def verify_graph(self, provider: ModelProvider) -> None:
        """The same for replays of a CUDA graph, in float32; also raises what the capture raises."""
        self.compare(provider, MODES["fp32"], under_graph=True)

    def modes(self) -> list[Mode]:
        """Those to be verified in."""
        # Kernels for GPUs need not serve float64.
        exact = [_EXACT] if self._setup.device.type == "cpu" else []
        return list({mode.name: mode for mode in (*exact, MODES["fp32"], self._timed)}.values())

    def _run(self, provider: ModelProvider, mode: Mode, under_graph: bool = False) -> _Trajectory:
        setup = replace(self._setup, mode=mode)
        with mode.precision():
            return _Trajectory.of(provider.train(setup), under_graph)

    def compare(self, provider: ModelProvider, mode: Mode, under_graph: bool = False) -> None:
        """Train in one mode; raises as `verify` and `verify_graph`."""
        actual = self._run(provider, mode, under_graph)
        where = f"{mode.name}{', replayed' if under_graph else ''}"
        for what in ("losses", "weights", "thresholds"):
            exact, plain = getattr(self._exact, what), getattr(self._plain[mode.name], what)
            error = distance(getattr(actual, what), exact)
            allowed = 2 * distance(plain, exact) + _FLOORS[mode.compute]
            if not error <= allowed:  # NaN is wrong, too
                raise WrongResultError(
                    f"{what} after {_STEPS} steps of {self._setup.model} in {where}: "
                    f"error {error:.3e} where {allowed:.3e} is allowed"
                )
