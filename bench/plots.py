"""Results as pictures. Made without pyplot, so no display and no global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .cases import LINEAR, Case
from .ceilings import CEILING, COPY, GEMM
from .environment import slug
from .files import write_with
from .measurements import COMPILED_DST, Measurements
from .work import flops, least_bytes

__all__ = ["write_plots"]

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999933", "#882255")
_ROOFLINE = ("dense", "auto", "fused", "packed", "dst_compiled", "dst_eager")
_PASS = "forward_backward"


def write_plots(measurements: Measurements, folder: Path) -> list[str]:
    """Write those PNGs for which there are figures; their names."""
    pictures = {
        "roofline": _roofline(measurements),
        "ratio-to-dense": _ratios(measurements, "dense", "dense"),
        "ratio-to-compiled": _ratios(measurements, COMPILED_DST, "best compiled DST"),
    }
    names = []
    for kind, figure in pictures.items():
        if figure is not None:
            names.append(f"{slug(measurements.gpu)}-{kind}.png")
            write_with(
                folder / names[-1],
                lambda path, figure=figure: figure.savefig(path, dpi=150, format="png"),
            )
    return names


def _roofline(measurements: Measurements) -> Figure | None:
    """FLOP/s of forward and backward over their arithmetic intensity, under the measured roof."""
    bandwidth = measurements.newest(COPY, CEILING, "forward", "bandwidth")
    peak = measurements.newest(GEMM, CEILING, "forward", "flops")
    cases = [case for case in measurements.cases.values() if case.op == LINEAR]
    points = {name: _points(measurements, cases, name) for name in _ROOFLINE}
    points = {name: found for name, found in points.items() if found}
    if not (bandwidth and peak and points):
        return None
    figure, axes = _figure(f"Forward and backward on {measurements.gpu}")
    intensities = [x for found in points.values() for x, _ in found] + [peak / bandwidth]
    low, high = min(intensities) / 2, max(intensities) * 2
    knee = [low, peak / bandwidth, high]
    axes.plot(knee, [min(peak, bandwidth * x) / 1e12 for x in knee], color="#222222", label="roof")
    for (name, found), color in zip(points.items(), _COLORS, strict=False):
        x, y = zip(*found, strict=True)
        axes.scatter(x, [value / 1e12 for value in y], s=18, color=color, alpha=0.8, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte at least moved", ylabel="TFLOP/s")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


def _points(
    measurements: Measurements, cases: Sequence[Case], provider: str
) -> list[tuple[float, float]]:
    found = []
    for case in cases:
        seconds = measurements.newest(case.name, provider, _PASS, "time")
        if seconds is not None:
            work = flops(case, _PASS)
            found.append((work / least_bytes(case, _PASS), work / seconds))
    return found


def _ratios(measurements: Measurements, others: str | Sequence[str], title: str) -> Figure | None:
    """Our time over theirs against the number of tokens, a line for each shape and dtype."""

    def ratio(case: Case) -> float | None:
        return measurements.time_ratio(case.name, _PASS, "auto", others)

    lines = _lines(measurements, ratio)
    if not lines:
        return None
    figure, axes = _figure(f"Ours ÷ {title}, forward and backward on {measurements.gpu}")
    for index, (label, found) in enumerate(lines.items()):
        x, y = zip(*sorted(found), strict=True)
        axes.plot(x, y, "o-", ms=4, color=_COLORS[index % len(_COLORS)], label=label)
    axes.axhline(1.0, color="#222222", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"time ÷ {title}")
    tokens = sorted({x for found in lines.values() for x, _ in found})
    axes.set_xticks(tokens, [str(x) for x in tokens])
    axes.xaxis.set_minor_formatter(NullFormatter())
    for kind in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        kind(ScalarFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(
    measurements: Measurements, ratio: Callable[[Case], float | None]
) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in measurements.cases.values():
        if case.op == LINEAR and (value := ratio(case)) is not None:
            lines.setdefault(f"{case.N} x {case.K}, {case.dtype}", []).append((case.M, value))
    return lines


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return figure, axes
