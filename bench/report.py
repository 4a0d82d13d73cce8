"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .cases import LINEAR, MASKED_WEIGHT, Case
from .ceilings import CEILING, COPY, GEMM
from .files import write_text
from .kinds import all_names
from .measurements import COMPILED_DST, Measurements, by_gpu
from .plots import write_plots
from .providers import PASSES, PIECES
from .report_models import list_tables, model_tables, readme_model_table
from .results import Row
from .tables import duration, markdown_table, mean_text, ratio_text

__all__ = ["markdown", "readme_table", "versions", "write_report"]

_PASS_TITLES = {
    (LINEAR, "forward"): "Linear, forward",
    (LINEAR, "backward"): "Linear, backward",
    (LINEAR, "forward_backward"): "Linear, forward and backward",
    (LINEAR, "step"): "Linear, step with AdamW (wall clock)",
    (LINEAR, "grad_input"): "Linear, gradient of the input",
    (LINEAR, "grad_weight"): "Linear, gradient of weight and threshold",
    (MASKED_WEIGHT, "forward"): "Masked weight, forward (pack)",
    (MASKED_WEIGHT, "backward"): "Masked weight, backward (post)",
}
_NOTE = (
    "Ratios of times in one run: of a CUDA graph's where both sides were captured (short work), "
    "else of enqueued calls with cold L2. Below 1 is faster."
)


def versions(measurements: Measurements) -> str:
    """Where, with what and when, in one line."""

    def all_of(column: str) -> str:
        return ", ".join(sorted({getattr(row, column) for row in measurements.rows}))

    days = sorted({row.date[:10] for row in measurements.rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"{measurements.gpu}, torch {all_of('torch')}, triton {all_of('triton')}, "
        f"commit {all_of('commit')}, {span}"
    )


def markdown(found: Iterable[Measurements], plots: Sequence[str] = ()) -> str:
    """The whole report: a section for each device; `plots`: file names, shown at the top."""
    parts = ["# Benchmark results"]
    parts += [f"![{name.rsplit('.', 1)[0]}]({name})" for name in plots]
    for measurements in found:
        parts += _section(measurements)
    return "\n\n".join(parts) + "\n"


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write report.md and its plots; their paths."""
    found = by_gpu(rows).values()
    plots = [name for one in found for name in write_plots(one, folder)]
    write_text(folder / "report.md", markdown(found, plots))
    return [folder / name for name in ("report.md", *plots)]


def _section(measurements: Measurements) -> list[str]:
    parts = [f"## {measurements.gpu}", versions(measurements) + ".", _NOTE, _ceilings(measurements)]
    tables = model_tables(measurements)
    for op in (LINEAR, MASKED_WEIGHT):
        for pass_name in (*PASSES, *PIECES):
            if table := _table(measurements, op, pass_name):
                tables.append((_PASS_TITLES[op, pass_name], table))
    for title, table in (*tables, *list_tables(measurements)):
        parts += [f"### {title}", table]
    if measurements.reasons:
        reasons = dict.fromkeys(measurements.reasons)
        lines = [
            f"- `{case}`, {provider}{pass_name and f', {pass_name}'}: {reason}"
            for case, provider, pass_name, reason in reasons
        ]
        parts += ["### Without figures", "\n".join(lines)]
    return parts


def _ceilings(measurements: Measurements) -> str:
    copy = measurements.newest(COPY, CEILING, "forward", "bandwidth")
    product = measurements.newest(GEMM, CEILING, "forward", "flops")
    parts = [f"copy {copy / 1e9:.4g} GB/s"] if copy else []
    parts += [f"matrix product {product / 1e12:.4g} TFLOP/s"] if product else []
    return f"Ceilings, measured: {', '.join(parts) or 'none'}."


def _table(measurements: Measurements, op: str, pass_name: str) -> str | None:
    """A row for each case: dense time, then everybody's ratio to it and ours to compiled DST."""
    cases = [
        case
        for case in measurements.cases.values()
        if case.op == op and measurements.newest(case.name, "dense", pass_name, "time")
    ]
    names = [
        name
        for name in all_names()
        if name != "dense"
        and any(measurements.newest(case.name, name, pass_name, "time") for case in cases)
    ]
    if not cases or not names:
        return None
    columns: dict[str, Callable[[Case], float | None]] = {
        f"{name} ÷ dense": lambda case, name=name: measurements.time_ratio(
            case.name, pass_name, name, "dense"
        )
        for name in names
    }
    if set(COMPILED_DST) & set(names) and "auto" in names:
        columns["auto ÷ best compiled DST"] = lambda case: measurements.time_ratio(
            case.name, pass_name, "auto", COMPILED_DST
        )
    if op == MASKED_WEIGHT:
        columns["auto, of copy bandwidth"] = lambda case: measurements.share_of_ceiling(
            case.name, "auto", pass_name, "bandwidth", COPY
        )
    head = ["M", "N", "K", "dtype", "dense", *columns]
    values = [[of_case(case) for of_case in columns.values()] for case in cases]
    lines = []
    for case, ratios in zip(cases, values, strict=True):
        dense = duration(measurements.newest(case.name, "dense", pass_name, "time"))
        sizes = [str(case.M or "-"), str(case.N), str(case.K), case.dtype]
        lines.append([*sizes, dense, *map(ratio_text, ratios)])
    lines.append(["geometric mean", "", "", "", "", *map(mean_text, zip(*values, strict=True))])
    return markdown_table(head, lines)


def readme_table(found: Iterable[Measurements]) -> str:
    """What the README shows: whole training steps, and the layer under bf16 autocast, in short."""
    parts = []
    for measurements in found:
        if steps := readme_model_table(measurements):
            parts.append(
                "Whole training steps (forward, loss, regulariser, backward, optimizer), ours over "
                "dense in the same run, and how many more launches the deferred step has.\n"
                f"Measured on {versions(measurements)}.\n\n{steps}"
            )
        if layers := _readme_layer_table(measurements):
            parts.append(
                "Forward and backward of one layer (bf16 autocast), ours over the others in the "
                f"same run; memory: peak, over dense.\nMeasured on {versions(measurements)}."
                f"\n\n{layers}"
            )
    return "\n\n".join(parts)


def _readme_layer_table(measurements: Measurements) -> str | None:
    cases = [
        case
        for case in measurements.cases.values()
        if case.op == LINEAR
        and case.dtype == "bf16-autocast"
        and measurements.newest(case.name, "dense", "forward_backward", "time")
    ]
    if not cases:
        return None
    values = [_summary_of(measurements, case) for case in cases]
    lines = [
        [
            str(case.M),
            f"{case.N} x {case.K}",
            duration(measurements.newest(case.name, "dense", "forward_backward", "time")),
            *map(ratio_text, ratios),
        ]
        for case, ratios in zip(cases, values, strict=True)
    ]
    means = [mean_text(column) for column in zip(*values, strict=True)]
    head = ["tokens", "weight", "dense", "÷ dense", "÷ compiled DST", "÷ eager DST", "memory"]
    return markdown_table(head, [*lines, ["geometric mean", "", "", *means]])


def _summary_of(measurements: Measurements, case: Case) -> list[float | None]:
    others = ("dense", COMPILED_DST, "dst_eager")
    times = [
        measurements.time_ratio(case.name, "forward_backward", "auto", other) for other in others
    ]
    return [
        *times,
        measurements.ratio(case.name, "forward_backward", "memory", "auto", "dense"),
    ]
