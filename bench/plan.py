"""The planner's table: how long each path takes, from measured rows."""

from __future__ import annotations

import json
from pathlib import Path

from .cases import LINEAR, Case
from .errors import UsageError
from .files import write_text
from .measurements import Measurements
from .modes import Mode

__all__ = ["plan_table", "write_plan"]

_PATHS = ("fused", "packed")
_PASSES = ("forward", "grad_input", "grad_weight")


def plan_table(measurements: Measurements) -> dict:
    """Seconds of forward (packed: with its pack), dX and dW by path, for the linear cases.

    Under a CUDA graph where both paths were, else as enqueued. Cases without some of these are left
    out, as nothing can be chosen by half of the figures. Raises UsageError where none is left.
    """
    cases, used = [], None
    for case in measurements.cases.values():
        entry = {name: _seconds(measurements, case, name) for name in _PASSES}
        if case.op == LINEAR and all(entry.values()):
            cases.append({**_key(case), **entry})
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
        "cases": cases,
    }


def write_plan(measurements: Measurements, path: Path) -> int:
    """Write the table; the number of its cases."""
    table = plan_table(measurements)
    cases = table.pop("cases")
    # One case a line, so that a new measurement changes the lines it is about.
    head = json.dumps(table, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(case)}" for case in cases)
    write_text(path, f'{head},\n  "cases": [\n{lines}\n  ]\n}}\n')
    return len(cases)


def _key(case: Case) -> dict:
    mode: Mode = case.mode
    return {
        "M": case.M,
        "N": case.N,
        "K": case.K,
        "input_dtype": str(mode.compute).removeprefix("torch."),
        "weight_dtype": str(mode.weight).removeprefix("torch."),
        "tf32": mode.tf32,
    }


def _seconds(measurements: Measurements, case: Case, pass_name: str) -> dict[str, float] | None:
    """By path, of the newest run that timed both."""
    for metric in ("graph_time", "time"):
        figures = [measurements.figures(case.name, path, pass_name, metric) for path in _PATHS]
        runs = figures[0].keys() & figures[1].keys()
        if runs:
            return {path: found[max(runs)] for path, found in zip(_PATHS, figures, strict=True)}
    return None
