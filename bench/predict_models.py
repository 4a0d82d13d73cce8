"""Predictions of whole training steps.

Dense, masked and the authors' steps are traced as they are. The others share a trace of the step
with masked weights that are in the compute dtype beforehand, which leaves out the weight side;
what each does for its weights is added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import dst_kernels

from .cases import ModelCase
from .machine import (
    COMPILED_CALL,
    HOST_PER_COMPILED_LAUNCH,
    HOST_PER_DEFERRED_LAYER,
    HOST_PER_GROUPED_LAYER,
    HOST_PER_LAUNCH,
    HOST_PER_OP,
    HOST_PER_SYNC,
    Figure,
    Kernel,
    Machine,
    gpu_time,
    optimizer_bytes,
    optimizer_launches,
    total_launches,
)
from .model_providers import MODEL_PROVIDERS, STEP
from .models import ADAMW
from .trace import Trace, fake_tensors, fused, trace
from .training import AT_REST, Setup, Training
from .work import bytes_of, weight_bytes

__all__ = ["predict_model"]

_BUCKET = 25 * 2**20  # bytes of weights in their own dtype, as `group_` cuts them
_GRAPHABLE = {provider.name: provider.graphable for provider in MODEL_PROVIDERS}


@dataclass(frozen=True)
class _Weights:
    """The parameters of a model, as counts. masked: sizes of its masked weights; rows: of them."""

    all: tuple[int, ...]
    masked: tuple[int, ...]
    rows: int

    @property
    def others(self) -> int:
        return sum(self.all) - sum(self.masked)


@dataclass
class _Step:
    """What a step does. `host`: seconds; `memory`: bytes at most beside parameters and state."""

    kernels: list[Kernel]
    host: float
    memory: float
    syncs: int = 0


def predict_model(case: ModelCase, machine: Machine) -> Iterator[Figure]:
    """Time, launches and peak memory of each provider's step; time as a CUDA graph."""
    steps = _steps(case)
    units, unit = steps.setup.about.units * case.batch, f"{steps.setup.about.unit}/s"
    for provider, step in steps.all().items():
        eager = max(gpu_time(step.kernels, machine), step.host) + step.syncs * HOST_PER_SYNC
        yield provider, STEP, "time", eager, "s"
        yield provider, STEP, "throughput", units / eager, unit
        if step.memory:
            yield provider, STEP, "memory", step.memory, "B"
        yield provider, STEP, "launches", total_launches(step.kernels), ""
        if _GRAPHABLE[provider]:
            graph = gpu_time(step.kernels, machine, warm=True)
            yield provider, STEP, "graph_time", graph, "s"
            yield provider, STEP, "graph_throughput", units / graph, unit


@functools.cache
def _steps(case: ModelCase) -> _Steps:
    """Traced once for all machines."""
    return _Steps(case)


class _GradientsOnly:
    """In an optimizer's place: its own kernels are counted by arithmetic."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def zero_grad(self, set_to_none: bool) -> None:
        self._model.zero_grad(set_to_none)

    def step(self) -> None:
        pass


class _Steps:
    """The steps of all providers of a case."""

    def __init__(self, case: ModelCase) -> None:
        device = torch.device("cpu")
        arguments = case.remaining_ratio, device, case.mode, AT_REST
        self.setup = Setup(case.model, case.batch, *arguments)
        self._kind, self._mode = self.setup.about.optimizer, case.mode
        self._adamw = self._kind == ADAMW
        by_name = {provider.name: provider.train for provider in MODEL_PROVIDERS}
        self._dense, self._masked, self._authors = (
            self._traced(by_name[name]) for name in ("dense", "masked", "dst_eager")
        )
        # Deferred, its masked weights being what the last step left: G stays in the compute dtype.
        self._base = self._traced(
            lambda setup: Training(setup, setup.network(self._in_compute_dtype), None)
        )
        with fake_tensors():
            model = self.setup.network(lambda dense: dense)
            named = dict(model.named_modules())
            masked = [named[name].weight for name in _masked_names(model)]
            self._weights = _Weights(
                tuple(each.numel() for each in model.parameters()),
                tuple(each.numel() for each in masked),
                sum(each.shape[0] for each in masked),
            )
            data = sum(each.untyped_storage().nbytes() for each in self.setup.data())
        state = 2 if self._adamw else 1
        stored = bytes_of(self._mode.weight)
        self._static = data + sum(self._weights.all) * stored * (1 + state)
        self._thresholds = self._weights.rows * 4 * (1 + state)

    def _traced(self, train: Callable[[Setup], Training]) -> Trace:
        with fake_tensors(), self._mode.precision():
            training = train(self.setup)
            training.optimizer = _GradientsOnly(training.model)
            trace(training.step)  # the first makes what the others find
            return trace(training.step, self._mode.tf32)

    def _in_compute_dtype(self, model: nn.Module) -> nn.Module:
        named = dict(model.named_modules())
        for layer in [named[name] for name in _masked_names(model)]:
            layer.weight = nn.Parameter(layer.weight.detach().to(self._mode.compute))
        return model

    # -- pieces --------------------------------------------------------------------------------

    def _pass(self, name: str, weights: int, launches: int = 1) -> Kernel:
        return Kernel(name, weights * weight_bytes(self._mode, name), launches=launches)

    def _torch_step(self, thresholds: bool) -> list[Kernel]:
        """torch's fused optimizer."""
        sizes = [*self._weights.all]
        if thresholds:  # one a layer, together as large as there are rows
            layers = len(self._weights.masked)
            sizes += [self._weights.rows // layers] * layers
        moved = optimizer_bytes(sum(sizes), bytes_of(self._mode.weight), self._adamw)
        return [Kernel("optimizer", moved, launches=optimizer_launches(sizes, self._adamw))]

    def _penalty(self) -> list[Kernel]:
        """Value and slopes, their scale; each threshold then has two gradients to be added."""
        return [Kernel("regulariser", self._weights.rows * 4 * 5, launches=4)] + [
            Kernel("sum of gradients", 0) for _ in self._weights.masked
        ]

    def _buckets(self) -> list[int]:
        """Weights in each call of the grouped pack; what fills a bucket alone goes alone."""
        buckets: list[int] = []
        most = _BUCKET // bytes_of(self._mode.weight)
        small = [size for size in self._weights.masked if size <= most]
        for size in small:
            if not buckets or buckets[-1] + size > most:
                buckets.append(0)
            buckets[-1] += size
        return buckets + [size for size in self._weights.masked if size > most]

    # -- the providers -------------------------------------------------------------------------

    def all(self) -> dict[str, _Step]:
        return {
            "dense": self._eager(self._dense, self._torch_step(thresholds=False), self._static),
            "deferred": self._deferred(),
            "grouped": self._grouped(),
            "masked": self._eager(
                self._masked,
                self._torch_step(thresholds=True),
                self._static + self._thresholds,
            ),
            "dst_eager": self._eager(
                self._authors, self._torch_step(thresholds=True), self._static + self._thresholds
            ),
            "dst_compiled": self._compiled(
                self._base,
                [each for size in self._weights.masked for each in self._branch_free(size)],
                [Kernel("regulariser", self._weights.rows * 8, launches=2)],
            ),
            "deferred_compiled": self._deferred_compiled(),
            "dense_compiled": self._compiled(self._dense, [], []),
            "masked_compiled": self._compiled(
                self._base,
                [
                    each
                    for size in self._weights.masked
                    for each in (self._pass("pack", size, launches=3), self._pass("post", size))
                ],
                [Kernel("regulariser", self._weights.rows * 8, launches=2)],
            ),
        }

    def _eager(self, found: Trace, more: list[Kernel], static: float) -> _Step:
        kernels = [*found.kernels, *more]
        host = total_launches(kernels) * HOST_PER_LAUNCH + found.ops * HOST_PER_OP
        return _Step(kernels, host, static + found.peak, found.syncs)

    def _deferred(self) -> _Step:
        weights = self._weights
        moved = sum(weights.masked) * weight_bytes(self._mode, self._kind)
        moved += optimizer_bytes(weights.others, bytes_of(self._mode.weight), self._adamw)
        step = self._eager(self._base, [Kernel("step", moved, launches=2)], self._static)
        step.memory += self._thresholds + self._packed_bytes()
        step.host += len(weights.masked) * HOST_PER_DEFERRED_LAYER
        return step

    def _grouped(self) -> _Step:
        buckets = self._buckets()
        passes = [self._pass("pack", size, launches=2) for size in buckets]
        passes += [self._pass("post", size) for size in buckets]
        more = [*passes, *self._penalty(), *self._torch_step(thresholds=True)]
        step = self._eager(self._base, more, self._static + self._thresholds)
        # Either where the forward ends, or where the last bucket's G become dW.
        stored, compute = bytes_of(self._mode.weight), bytes_of(self._mode.compute)
        last = sum(self._weights.all) * stored + max(buckets) * compute
        step.memory += self._packed_bytes() + max(last - self._base.peak, 0)
        step.host += len(self._weights.masked) * HOST_PER_GROUPED_LAYER
        return step

    def _packed_bytes(self) -> int:
        return sum(self._weights.masked) * bytes_of(self._mode.compute)

    # -- compiled ------------------------------------------------------------------------------

    def _branch_free(self, size: int) -> list[Kernel]:
        """Counting reads W before the mask does; G becomes dW and dt in one kernel."""
        count = Kernel("count", size * bytes_of(self._mode.weight), launches=2)
        return [count, self._pass("pack", size), self._pass("post", size)]

    def _deferred_compiled(self) -> _Step:
        """Each layer packs inside the graph, so the step writes no W * M; G goes to the step in the
        weight's dtype, as only the grouped forward asks for another.
        """
        weights, stored = self._weights, bytes_of(self._mode.weight)
        passes = []
        for size in weights.masked:
            passes.append(self._pass("pack", size, launches=3))
            if self._mode.autocasts:
                cast = size * (stored + bytes_of(self._mode.compute))
                passes.append(Kernel("cast of G", cast))
        moved = optimizer_bytes(sum(weights.all), stored, self._adamw)
        return self._compiled(self._base, passes, [], [Kernel("step", moved, launches=2)])

    def _compiled(
        self,
        found: Trace,
        passes: Sequence[Kernel],
        penalty: Sequence[Kernel],
        step: Sequence[Kernel] | None = None,
    ) -> _Step:
        """No memory: what a compiler keeps for backward and what it computes anew is its choice."""
        inside = [*fused(found.kernels), *passes, *penalty]
        outside = self._torch_step(thresholds=bool(passes)) if step is None else list(step)
        host = total_launches(inside) * HOST_PER_COMPILED_LAUNCH + COMPILED_CALL
        host += total_launches(outside) * HOST_PER_LAUNCH
        return _Step([*inside, *outside], host, 0)


def _masked_names(model: nn.Module) -> list[str]:
    config = dst_kernels.SparsifyConfig.paper()
    return dst_kernels.plan_sparsify(model, config).named("convert")
