"""Predictions of single layers, single weights and lists of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from dst_kernels.plan import PACKED, PLANS, Plan, plan_linear

from .cases import CONV, LINEAR, MASKED_WEIGHT, LayerCase, ListCase
from .kinds import providers_for
from .list_providers import PACK, POST
from .machine import (
    COMPILED_CALL,
    HOST_PER_COMPILED_LAUNCH,
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
from .models import ADAMW
from .passes import prepare, saved_bytes
from .problem import Problem
from .shapes import WEIGHT_LISTS
from .trace import Trace, fake_tensors, trace
from .work import bytes_of, flops, least_bytes, list_bytes

__all__ = ["predict_layer", "predict_list"]

_FLUSHED = 256 * 2**20  # bytes that triton's do_bench writes before each call, while the host works
_SHORT, _HOST_MATTERS = 1e-3, 5e-3  # below, there are graph_time and host_time (measure.py)
_PASSES = {
    LINEAR: ("forward", "forward_backward", "grad_input", "grad_weight"),
    CONV: ("forward", "forward_backward", "grad_input", "grad_weight"),
    MASKED_WEIGHT: ("forward", "backward"),
}

Traces = dict[str, Trace]


def predict_layer(case: LayerCase, machine: Machine) -> Iterator[Figure]:
    """Times, bandwidth or FLOP/s, memory and host cost of each pass of the providers."""
    traces = {
        provider.name: _traces(case, provider)
        for provider in providers_for(case.op)
        if not provider.compiled and provider.name != "auto"
    }
    if case.op == MASKED_WEIGHT:
        (auto,) = providers_for(case.op, ["auto"])
        traces["auto"] = packed = _traces(case, auto)
    else:
        traces["auto"], packed = traces[_path(case)], traces["packed"]
    graphable = {one.name: one.graphable for one in providers_for(case.op)}
    for name, found in traces.items():
        for pass_name, one in found.items():
            host = one.launches * HOST_PER_LAUNCH + one.ops * HOST_PER_OP
            yield from _figures(case, name, pass_name, one, host, machine, graphable[name])
    for pass_name, one in packed.items():
        compiled = Trace(_branch_free(one.kernels, case))
        host = COMPILED_CALL + compiled.launches * HOST_PER_COMPILED_LAUNCH
        yield from _figures(case, "dst_compiled", pass_name, compiled, host, machine, True)


def _traces(case: LayerCase, provider) -> Traces:
    """By pass; of "forward" the bytes saved for backward, too."""
    found: Traces = {}
    with fake_tensors(), case.mode.precision():
        problem = Problem(case, torch.device("cpu"))
        module = provider.build(problem)
        for name in _PASSES[case.op]:
            if name not in provider.passes:
                continue
            prepared = prepare(name, provider, module, problem)
            with prepared.surroundings():
                trace(prepared.call)  # the first may do more than the others
                found[name] = trace(prepared.call, case.mode.tf32)
        if case.op == LINEAR and "forward" in found:
            found["forward"].saved = saved_bytes(module, problem)
    return found


def _path(case: LayerCase) -> str:
    """What "auto" takes before anything is measured on the GPU."""
    if case.op == CONV:
        return PACKED
    mode = case.mode
    plan: Plan = plan_linear(case.M, case.N, case.K, mode.compute, mode.weight, tf32=mode.tf32)
    return next(name for name, one in PLANS.items() if one == plan)


def _branch_free(kernels: Sequence[Kernel], case: LayerCase) -> list[Kernel]:
    """What a compiler makes of plain PyTorch: as packed, but W is read once more, to be counted
    before it is masked, and nothing is committed."""
    result: list[Kernel] = []
    for kernel in kernels:
        if kernel.name == "masked_weight":
            stored = math.prod(case.weight_shape) * bytes_of(case.mode.weight)
            result += [Kernel("count", stored, launches=2), replace(kernel, launches=1)]
        elif kernel.name not in ("copy_", "zeros"):
            result.append(kernel)
    return result


def _figures(
    case: LayerCase,
    provider: str,
    name: str,
    found: Trace,
    host: float,
    machine: Machine,
    graphable: bool,
) -> Iterator[Figure]:
    if not found.kernels:  # a cast to the dtype that the weight has
        return
    gpu = gpu_time(found.kernels, machine)
    if found.syncs:
        time = max(gpu, host) + found.syncs * HOST_PER_SYNC
    else:
        time = max(gpu, host - _FLUSHED / machine.copy)
    yield provider, name, "time", time, "s"
    work = flops(case, name)
    if work is None:
        yield provider, name, "bandwidth", least_bytes(case, name) / time, "B/s"
    else:
        yield provider, name, "flops", work / time, "FLOP/s"
    if graphable and time < _SHORT:
        yield provider, name, "graph_time", gpu_time(found.kernels, machine, warm=True), "s"
    if time < _HOST_MATTERS and name in ("forward", "forward_backward"):
        yield provider, name, "host_time", host, "s"
    if found.peak and name == "forward_backward":
        yield provider, name, "memory", found.peak, "B"
    if found.saved is not None:
        yield provider, name, "saved", found.saved, "B"


def predict_list(case: ListCase, machine: Machine) -> Iterator[Figure]:
    """Bandwidth over all weights of a model in a call, by what must be moved and the launches."""
    sizes = [math.prod(shape) for shape in WEIGHT_LISTS[case.weights].shapes]
    stored, compute = bytes_of(case.mode.weight), bytes_of(case.mode.compute)
    for provider in providers_for(case.op):
        for name in provider.passes:
            adamw = name == ADAMW
            if provider.name == "auto":
                kernels = [Kernel(name, list_bytes(case, name), launches=1 + (name != POST))]
            elif name in (PACK, POST):  # a cast of weights, or of gradients
                kernels = [Kernel("cast", case.numel * (stored + compute))]
            else:
                moved = optimizer_bytes(case.numel, stored, adamw)
                kernels = [Kernel(name, moved, launches=optimizer_launches(sizes, adamw))]
            time = gpu_time(kernels, machine)
            host = total_launches(kernels) * HOST_PER_LAUNCH
            graph = gpu_time(kernels, machine, warm=True)
            eager = max(time, host - _FLUSHED / machine.copy)
            yield provider.name, name, "time", eager, "s"
            yield provider.name, name, "graph_time", graph, "s"
            yield provider.name, name, "bandwidth", list_bytes(case, name) / graph, "B/s"
