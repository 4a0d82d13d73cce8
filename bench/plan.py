"""The planner's table: how long each path takes, from measured rows."""

from __future__ import annotations

import json
from pathlib import Path

from .cases import Case
from .measurements import Measurements
from .report.tables import markdown_table
from .results import UsageError, write_whole

_LISTS = {"linear": "cases", "conv": "convs"}
_PATHS = ("fused", "packed")
_PASSES = ("forward", "grad_input", "grad_weight")


def write_plan(measurements: Measurements, path: Path) -> dict:
    """Write the planner's table as JSON and return it: seconds by pass and path for each layer.

    Under a CUDA graph where both paths were, else as enqueued. Cases without some of these are left
    out, as nothing can be chosen by half of the figures. Raises UsageError where none is left.
    """
    found, used = {name: [] for name in _LISTS.values()}, []
    for name, case in measurements.cases.items():
        entry = {one: _seconds(measurements, name, one) for one in _PASSES}
        if case.op in _LISTS and all(entry.values()):
            found[_LISTS[case.op]].append({**_key(case), **entry})
            used += [row for row in measurements.rows if row.case == name]
    if not used:
        raise UsageError(
            f"the results of {measurements.gpu} have no case with the times of "
            f"{' and '.join(_PATHS)} for {', '.join(_PASSES)}. Accepted: a results.csv with one."
        )
    last = max(used, key=lambda row: row.date)
    head = {name: getattr(last, name) for name in ("gpu", "torch", "triton", "commit", "date")}
    return write_table(path, head, found)


def write_table(path: Path, head: dict[str, str], found: dict[str, list[dict]]) -> dict:
    """Write a table of the planner's as JSON and return it.

    One case a line, so that a new measurement changes the lines it is about.
    """
    parts = [json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")]
    for name, cases in found.items():
        lines = ",".join(f"\n    {json.dumps(case)}" for case in cases)
        parts.append(f'  "{name}": [{lines}\n  ]')
    write_whole(path, ",\n".join(parts) + "\n}\n")
    return {**head, **found}


def plan_markdown(table: dict) -> str:
    """Show for each layer how the fused path compares with the packed one."""
    lines = []
    for case in (case for name in _LISTS.values() for case in table[name]):
        about = [f"{name}={case[name]}" for name in ("M", "N", "K", "C", "kernel") if name in case]
        about += [case["weight_dtype"], "tf32" if case["tf32"] else case["input_dtype"]]
        ratios = [case[name]["fused"] / case[name]["packed"] for name in _PASSES]
        faster = min(_PATHS, key=lambda path, case=case: sum(case[name][path] for name in _PASSES))
        lines.append([" ".join(about), *(f"{ratio:.2f}" for ratio in ratios), faster])
    return markdown_table(["fused ÷ packed", "forward", "dX", "dW", "faster in all"], lines)


def _key(case: Case) -> dict:
    """Return what the planner looks a layer up by; C counts the channels of one group."""
    sizes = {"M": case.M, "N": case.N}
    if case.op == "linear":
        sizes["K"] = case.K
    else:
        sides = {"kernel": [case.kernel] * 2, "stride": [case.stride] * 2, "groups": case.groups}
        sizes |= {"C": case.C // case.groups, **sides}
    dtypes = {"input_dtype": case.mode.compute, "weight_dtype": case.mode.weight}
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    return {**sizes, **names, "tf32": case.mode.tf32}


def _seconds(found: Measurements, case: str, pass_name: str) -> dict[str, float] | None:
    """Return both paths' time in the newest run that has both."""
    for metric in ("graph_time", "time"):
        fused, packed = (found.figures(case, path, pass_name, metric) for path in _PATHS)
        if runs := fused.keys() & packed.keys():
            return {"fused": fused[max(runs)], "packed": packed[max(runs)]}
    return None
