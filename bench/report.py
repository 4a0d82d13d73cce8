"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import CONV, LINEAR
from .ceilings import CEILING, COPY, GEMM
from .environment import is_predicted
from .files import write_text
from .measurements import Measurements, by_gpu
from .plots import write_plots
from .report_kernels import kernel_tables
from .report_layers import layer_tables, readme_layer_table
from .report_models import list_tables, model_tables, readme_model_table
from .results import Row

__all__ = ["markdown", "readme_table", "versions", "write_report"]

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
    for tables in (model_tables, layer_tables, list_tables, kernel_tables):
        for title, table in tables(measurements):
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
    how = "predicted" if is_predicted(measurements.gpu) else "measured"
    return f"Ceilings, {how}: {', '.join(parts) or 'none'}."


def readme_table(found: Iterable[Measurements]) -> str:
    """What the README shows: whole training steps, and layers under bf16 autocast, in short."""
    parts = []
    for measurements in found:
        if steps := readme_model_table(measurements):
            parts.append(
                "Whole training steps (forward, loss, regulariser, backward, optimizer), ours over "
                "others in the same run, and how many more launches the deferred step has than "
                "dense.\n"
                f"Measured on {versions(measurements)}.\n\n{steps}"
            )
        for op, kind in ((LINEAR, "linear layer"), (CONV, "convolution")):
            if layers := readme_layer_table(measurements, op):
                parts.append(
                    f"Forward and backward of one {kind} (bf16 autocast), ours over the others in "
                    f"the same run; memory: peak, over dense.\n"
                    f"Measured on {versions(measurements)}.\n\n{layers}"
                )
    return "\n\n".join(parts)
