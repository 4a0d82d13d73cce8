"""The planner's measurements: one JSON file for each GPU under `tables/`.

A file is an object with `gpu` (as torch names the device), where it was measured (`torch`,
`triton`, `commit`, `date`) and `cases`: objects with M, N, K, `input_dtype`, `weight_dtype` and
for each of `forward`, `grad_input` and `grad_weight` the seconds `fused` and `packed`.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources

import torch

__all__ = ["measured_costs"]

# How far a measured case may be: the product of the factors by which M, N and K differ.
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
    """Seconds by `path_product` of the nearest measured case, or None where none is near."""
    wanted = (_name(input_dtype), _name(weight_dtype))
    nearest, least = None, math.log(_FARTHEST)
    for case in _tables().get(gpu, ()):
        if (case["input_dtype"], case["weight_dtype"]) != wanted:
            continue
        distance = sum(
            abs(math.log(max(size, 1) / case[name]))
            for name, size in (("M", M), ("N", N), ("K", K))
        )
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
def _tables() -> dict[str, list[dict]]:
    """Cases by GPU."""
    tables = {}
    for file in resources.files(__package__).joinpath("tables").iterdir():
        if file.name.endswith(".json"):
            table = json.loads(file.read_text())
            tables[table["gpu"]] = table["cases"]
    return tables
