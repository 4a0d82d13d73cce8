"""Figures as Markdown: report.md, and the short table that the README shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from ..cases import CASES
from ..contenders import CONTENDERS
from ..measurements import CEILING, CHOSEN, COPY, GEMM, Measurements, by_device, duration
from ..results import ROOT, Row, UsageError, write_whole
from .plots import write_plots

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_NOTE = (
    "Ratios are of times in one run: under a CUDA graph where all that are compared were captured, "
    "else of enqueued calls with cold L2. **Below 1 is faster.** The last line is the geometric "
    "mean, and says of how many cases where not of all."
)
_OPS = {"linear": "Linear layer", "conv": "Convolution", "weights": "Weights", "model": "Model"}
_OPS |= {"training": "Sparse training, on threads of a CPU"}
_PASSES = {
    "forward_backward": "forward and backward",
    "grad_input": "gradient of the input",
    "grad_weight": "gradient of weight and threshold",
    "pack": "mask and cast (pack)",
    "post": "gradients of weight and threshold (post)",
}
_STEP_TABLES = {
    "eager (wall clock)": ("time", duration),
    "CUDA graph": ("graph_time", duration),
    "samples or tokens a second, eager: above 1 is faster": ("throughput", "{:.0f}".format),
    "launches": ("launches", "{:.0f}".format),
    "peak memory": ("memory", lambda count: f"{count / 2**20:.4g} MiB"),
}
_MAIN_TABLES = (
    ("Linear layers, forward and backward", "linear", ("auto", "dst_eager", "dst_compiled")),
    ("Convolutions, forward and backward", "conv", ("auto", "dst_eager", "dst_compiled")),
    ("Whole training steps, eager or as a CUDA graph: the faster", "model", None),
    ("Training steps that may get faster as they get sparser", "training", None),
)


class Column(NamedTuple):
    """A figure or text of each case by its name, None without one."""

    head: str
    of_case: Callable[[str], float | str | None]
    text: Callable[[Any], str] | None = None  # how it reads; None: a ratio, which has a mean


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write report.md, with a section for each device, and its plots; return their paths."""
    parts, paths = ["# Benchmark results"], [folder / "report.md"]
    for found in by_device(rows).values():
        plots = write_plots(found, {op: _rivals(found, op) for op in CASES}, folder)
        paths += plots
        ceilings = []
        if copy := found.newest(COPY, CEILING, "forward", "bandwidth"):
            ceilings.append(f"a copy {copy / 1e9:.4g} GB/s")
        if product := found.newest(GEMM, CEILING, "forward", "flops"):
            ceilings.append(f"a matrix product {product / 1e12:.3g} TFLOP/s")
        parts += [f"## {found.gpu}", f"{versions(found)}."]
        parts += [f"Ceilings, measured: {', '.join(ceilings) or 'none'}.", _NOTE]
        parts += [f"![{path.stem}]({path.name})" for path in plots]
        for title, op, columns in _tables(found):
            if table := _table(found, op, columns):
                parts += [f"### {title}", table]
        reasons: dict[tuple[str, str], list[str]] = {}
        for case, contender, pass_name, reason in found.reasons:
            reasons.setdefault((contender, reason), []).append(f"`{case}` {pass_name}".strip())
        lines = [f"- **{who}**: {why} ({few(where)})" for (who, why), where in reasons.items()]
        parts += ["### Without figures", "\n".join(lines)] if lines else []
    write_whole(folder / "report.md", "\n\n".join(parts) + "\n")
    return paths


def versions(found: Measurements) -> str:
    """Return where, with what and when, in one line."""
    names = ("torch", "triton", "commit")
    used = [f"{name} {', '.join(sorted({getattr(r, name) for r in found.rows}))}" for name in names]
    days = sorted({row.date[:10] for row in found.rows})
    return ", ".join([found.gpu, *used, " to ".join(dict.fromkeys([days[0], days[-1]]))])


def few(names: Iterable[str], most: int = 3, between: str = ", ") -> str:
    """Return the first names, each once, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = [f"and {len(names) - most} more"] * (len(names) > most)
    return between.join([*names[:most], *more])


def _tables(found: Measurements) -> Iterator[tuple[str, str, list[Column]]]:
    """Yield title, op and columns for every op and pass that was measured, whole steps first."""
    for op in sorted(CASES, key=lambda op: op != "model"):
        rivals = _rivals(found, op)
        timed = [r for r in found.rows if r.metric == "time" and r.case.startswith(f"{op}-")]
        for name, tiles in dict.fromkeys((row.pass_, row.suite == "tune") for row in timed):
            about = f"{_OPS[op]}, {_PASSES.get(name, name)}"
            if tiles:
                about = f"Tiles of {about[0].lower()}{about[1:]}"
                of = {"pass_name": name, "metric": "time"}
                time = partial(found.newest, contender=CHOSEN, **of)
                over = partial(found.ratio, ours=CHOSEN, others=rivals, **of)
                named = [rival for rival in rivals if rival != CHOSEN]
                best = partial(found.fastest, pass_name=name, contenders=named)
                columns = [Column(CHOSEN, time, duration), Column("fastest", best, str)]
                yield about, op, [*columns, Column("chosen ÷ fastest", over)]
            elif (op, name) == ("model", "step"):
                for title, how in _STEP_TABLES.items():
                    columns = _over_dense(found, name, rivals, *how)
                    yield f"Whole training step, {title}", op, columns
            else:
                columns = _over_dense(found, name, rivals)
                if op in ("weights", "model"):  # at best as fast as a copy
                    for ours in ("auto", "deferred"):
                        share = partial(found.share_of_copy, contender=ours, pass_name=name)
                        columns.append(Column(f"{ours}, of copy bandwidth", share))
                yield about, op, columns


def _over_dense(
    found: Measurements, pass_name: str, names: Iterable, metric: Any = None, text: Any = duration
) -> list[Column]:
    """Return dense as it is and others over it, by default in times that are fit to compare."""
    ratio = partial(found.ratio, metric=metric) if metric else found.time_ratio
    dense = {"contender": "dense", "pass_name": pass_name, "metric": metric or "time"}
    over = partial(ratio, pass_name=pass_name, others="dense")
    columns = [Column(f"{name} ÷ dense", partial(over, ours=name)) for name in names]
    return [Column("dense", partial(found.newest, **dense), text), *columns]


def _rivals(found: Measurements, op: str) -> list[str]:
    """Return all contenders but dense in their order, also those that only the results know."""
    measured = [row.provider for row in found.rows if row.case.startswith(f"{op}-")]
    names = [*(contender.name for contender in CONTENDERS[op]), *measured]
    return [name for name in dict.fromkeys(names) if name != "dense"]


def _table(found: Measurements, op: str, columns: Sequence[Column]) -> str | None:
    """Return a line for each case that has a figure, and no column without one; None if empty."""
    cases = [case for case in found.cases.values() if case.op == op]
    cells = {
        column: {case: value for case in cases if (value := column.of_case(case.name)) is not None}
        for column in columns
    }
    cells = {column: figures for column, figures in cells.items() if figures}
    cases = [case for case in cases if any(case in figures for figures in cells.values())]
    if not cases:
        return None
    about = [field.name for field in dataclasses.fields(cases[0])]
    about.sort(key=lambda name: name in ("dtype", "remaining_ratio"))  # sizes first
    if len({case.remaining_ratio for case in cases}) == 1:
        about.remove("remaining_ratio")
    lines = [[str(getattr(case, name)) for name in about] for case in cases]
    means = ["geometric mean", *[""] * (len(about) - 1)]
    for column, figures in cells.items():
        for case, line in zip(cases, lines, strict=True):
            text = column.text or "{:.2f}".format
            line.append(text(figures[case]) if case in figures else "-")
        of = f" ({len(figures)} of {len(cases)})" if len(figures) < len(cases) else ""
        means.append("" if column.text else f"{geometric_mean(figures.values()):.2f}{of}")
    if len(cases) > 1 and any(means[len(about) :]):
        lines.append(means)
    return markdown_table([*about, *(column.head for column in cells)], lines)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, aligned to the right as numbers are."""
    rule = ["---:"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def main_table(found: Measurements) -> str:
    """Return what matters most of one device: linear layers, convolutions, whole models."""
    parts = [f"Times ÷ dense in the same run: below 1 is faster. Measured on {versions(found)}."]
    for title, op, names in _MAIN_TABLES:
        if names is None:
            columns = _over_dense(found, "step", _rivals(found, op), ("time", "graph_time"))
        else:
            columns = _over_dense(found, "forward_backward", names)
        if table := _table(found, op, columns):
            parts += [f"**{title}**", table]
    if len(parts) == 1:
        parts.append("No linear layer, convolution or whole model was measured.")
    return "\n\n".join(parts)


def has_markers(path: Path) -> bool:
    """Return whether a file has a place for the table: `BEGIN` and `END`, once and in order."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def refresh_readme(path: Path, table: str) -> None:
    """Replace what is between the markers. Raises UsageError where `path` has not both."""
    if not has_markers(path):
        raise UsageError(
            f"--readme is {path}. Accepted: a file with one {BEGIN} and one {END} after it."
        )
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    write_whole(path, f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
