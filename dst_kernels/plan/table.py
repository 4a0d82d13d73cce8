"""Read the planner's measurements under `tables/`: one JSON file for each GPU, one for CPUs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources

import torch

# How far a measured case may be: the product of the factors by which its sizes differ.
_FARTHEST = 8.0
_PRODUCTS = ("forward", "grad_input", "grad_weight")


def measured_costs(
    gpu: str | None,
    M: int,
    N: int,
    K: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> dict[str, float] | None:
    """Return the nearest linear case's seconds, by "{path}_{product}"; None if none is near."""
    alike = {"input_dtype": _name(input_dtype), "weight_dtype": _name(weight_dtype)}
    return _nearest(gpu, "cases", {"M": M, "N": N, "K": K}, alike)


def measured_conv_costs(
    gpu: str | None,
    M: int,
    N: int,
    C: int,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    kernel: Sequence[int],
    stride: Sequence[int],
    groups: int,
) -> dict[str, float] | None:
    """Return what `measured_costs` does, for the nearest convolution."""
    alike = {
        "kernel": list(kernel),
        "stride": list(stride),
        "groups": groups,
        "input_dtype": _name(input_dtype),
        "weight_dtype": _name(weight_dtype),
    }
    return _nearest(gpu, "convs", {"M": M, "N": N, "C": C}, alike)


def measured_share(
    kind: str, M: int, N: int, K: int, dtype: torch.dtype, made: bool = False
) -> float:
    """Return up to which share of kept weights a CPU is faster by kept rows; 0: never, or unknown.

    It is that of the nearest case of this kind and dtype. `made`: an optimizer's step makes the
    rows, so that the forward need not take them from W * M.
    """
    sizes, share, least = {"M": M, "N": N, "K": K}, 0.0, math.inf
    for case in _tables().get("cpu", {}).get("kept", ()):
        if case["kind"] == kind and case["dtype"] == _name(dtype):
            distance = _distance(sizes, case)
            if distance < least:
                share, least = case["share"], distance
                if made:
                    share = case.get("share_if_made", share)
    return share


def _distance(sizes: Mapping[str, int], case: Mapping[str, int]) -> float:
    """Return the logarithm of the product of the factors by which sizes differ."""
    return sum(abs(math.log(max(size, 1) / case[name])) for name, size in sizes.items())


def _nearest(
    gpu: str | None, kind: str, sizes: Mapping[str, int], alike: Mapping[str, object]
) -> dict[str, float] | None:
    """Return the costs of the case with the values `alike` whose `sizes` are the nearest."""
    nearest, least = None, math.log(_FARTHEST)
    for case in _tables().get(gpu or "", {}).get(kind, ()):
        if case["input_dtype"] == "float32" and not case.get("tf32", True):
            continue  # measured without TF32; the planner estimates such products
        if any(case[name] != value for name, value in alike.items()):
            continue
        distance = _distance(sizes, case)
        if distance <= least:
            nearest, least = case, distance
    if nearest is None:
        return None
    return {
        f"{path}_{product}": nearest[product][path]
        for product in _PRODUCTS
        for path in ("fused", "packed")
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _tables() -> dict[str, dict[str, list]]:
    """Read all tables, keyed by GPU name."""
    tables = {}
    for file in resources.files(__package__).joinpath("tables").iterdir():
        if file.name.endswith(".json"):
            table = json.loads(file.read_text())
            tables[table["gpu"]] = table
    return tables
