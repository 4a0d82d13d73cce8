"""The planner's table: how long each path takes, from measured rows."""

from __future__ import annotations

import json
from pathlib import Path

from .cases import CONV, LINEAR, LayerCase
from .environment import is_predicted
from .errors import UsageError
from .files import write_text
from .measurements import Measurements
from .modes import Mode

__all__ = ["plan_table", "write_plan"]

_LISTS = {LINEAR: "cases", CONV: "convs"}
_PATHS = ("fused", "packed")
_PASSES = ("forward", "grad_input", "grad_weight")


def plan_table(measurements: Measurements) -> dict:
    """Seconds of forward (packed: with its pack), dX and dW by path: `cases` of linear layers and
    `convs`.

    Under a CUDA graph where both paths were, else as enqueued. Cases without some of these are left
    out, as nothing can be chosen by half of the figures. Raises UsageError where none is left, and
    for predictions, which the planner can make itself.
    """
    if is_predicted(measurements.gpu):
        raise UsageError(
            f"CSV has rows of {measurements.gpu!r}. Accepted: rows that were measured on a GPU."
        )
    found, used = {name: [] for name in _LISTS.values()}, None
    for case in measurements.cases.values():
        entry = {name: _seconds(measurements, case, name) for name in _PASSES}
        if case.op in _LISTS and all(entry.values()):
            found[_LISTS[case.op]].append({**_key(case), **entry})
            rows = [row for row in measurements.rows if row.case == case.name]
            last = max(rows, key=lambda row: row.date)
            used = last if used is None or last.date > used.date else used
    if used is None:
        raise UsageError(
            f"the results of {measurements.gpu} have no case with the times of "
            f"{' and '.join(_PATHS)} for {', '.join(_PASSES)}. Accepted: a results.csv with one."
        )
    return {
        "gpu": measurements.gpu,
        "torch": used.torch,
        "triton": used.triton,
        "commit": used.commit,
        "date": used.date,
        **found,
    }


def write_plan(measurements: Measurements, path: Path) -> int:
    """Write the table; the number of its cases."""
    table = plan_table(measurements)
    lists = {name: table.pop(name) for name in _LISTS.values()}
    # One case a line, so that a new measurement changes the lines it is about.
    parts = [json.dumps(table, indent=2, ensure_ascii=False).removesuffix("\n}")]
    for name, cases in lists.items():
        lines = ",".join(f"\n    {json.dumps(case)}" for case in cases)
        parts.append(f'  "{name}": [{lines}\n  ]')
    write_text(path, ",\n".join(parts) + "\n}\n")
    return sum(map(len, lists.values()))


def _key(case: LayerCase) -> dict:
    mode: Mode = case.mode
    return {
        **_sizes(case),
        "input_dtype": str(mode.compute).removeprefix("torch."),
        "weight_dtype": str(mode.weight).removeprefix("torch."),
        "tf32": mode.tf32,
    }


def _sizes(case: LayerCase) -> dict:
    if case.op == LINEAR:
        return {"M": case.M, "N": case.N, "K": case.K}
    return {
        "M": case.M,
        "N": case.N,
        "C": case.C,
        "kernel": [case.kernel] * 2,
        "stride": [case.stride] * 2,
        "groups": case.groups,
    }


def _seconds(
    measurements: Measurements, case: LayerCase, pass_name: str
) -> dict[str, float] | None:
    """By path, of the newest run that timed both."""
    for metric in ("graph_time", "time"):
        figures = [measurements.figures(case.name, path, pass_name, metric) for path in _PATHS]
        runs = figures[0].keys() & figures[1].keys()
        if runs:
            return {path: found[max(runs)] for path, found in zip(_PATHS, figures, strict=True)}
    return None
