"""Figures as pictures, made without pyplot: no display and no global state."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..cases import Case
from ..measurements import Measurements
from ..results import slug, write_whole

_COLORS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
_COLORS += ("#882255", "#999933", "#56b4e9", "#6a51a3", "#8c6d46")
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
_TITLES = {
    "linear": ("forward_backward", "Linear layers, forward and backward"),
    "conv": ("forward_backward", "Convolutions, forward and backward"),
    "weights": ("post", "Gradients of weights and thresholds"),
    "model": ("step", "Whole training steps"),
    "training": ("step", "Training steps that may get faster as they get sparser"),
}


def write_plots(found: Measurements, names: dict[str, list[str]], folder: Path) -> list[Path]:
    """Draw times over dense, eager or as a CUDA graph, in a PNG for each op; return their paths.

    `names` are the contenders of each op but dense; their order decides the colours.
    """
    paths = []
    for op, (pass_name, title) in _TITLES.items():
        cases = [case for case in found.cases.values() if case.op == op][::-1]
        points: dict[str, dict[Case, float]] = {name: {} for name in names[op]}
        for name, case in itertools.product(points, cases):
            if ratio := found.ratio(case.name, pass_name, ("time", "graph_time"), name, "dense"):
                points[name][case] = ratio
        if any(points.values()):
            figure = (_curves if op == "training" else _dots)(cases, points)
            figure.suptitle(f"{title}\n{found.gpu}")
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
            paths.append(folder / f"{slug(found.gpu)}-{op}.png")
            write_whole(paths[-1], lambda file, figure=figure: figure.savefig(file, dpi=120))
    return paths


def _dots(cases: list[Case], points: dict[str, dict[Case, float]]) -> Figure:
    figure = Figure((8, 1.8 + 0.28 * len(cases)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="time ÷ dense: left is faster")
    for (name, some), color in zip(points.items(), itertools.cycle(_COLORS)):
        style = {"marker": "D" if name.startswith("dst_") else "o", "s": 28, "color": color}
        axes.scatter(some.values(), [*map(cases.index, some)], label=name * bool(some), **style)
    axes.axvline(1.0, color="#222222", linewidth=1)
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(cases)), [case.name.partition("-")[2] for case in cases])
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="both", alpha=0.2)
    return figure


def _curves(cases: list[Case], points: dict[str, dict[Case, float]]) -> Figure:
    """Draw them by the share of weights that remain, for each model and number of threads."""
    panels = sorted({(case.threads, case.model) for case in cases})
    figure = Figure((4 * len(panels) + 2, 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, some), color in zip(points.items(), itertools.cycle(_COLORS)):
            line = [
                (c.remaining_ratio * 100, some[c]) for c in some if (c.threads, c.model) == panel
            ]
            style = {"color": color, "markersize": 4, "label": name * (panel == panels[0])}
            if line:
                axes.plot(*zip(*sorted(line), strict=True), "o-", **style)
        axes.axhline(1.0, color="#222222", linewidth=1)
        axes.set(title=f"{panel[1]}, threads: {panel[0]}", xscale="log", ylim=(0, 2))
        axes.set(xlabel="remaining weights, %", ylabel="time ÷ dense: below 1 is faster")
        axes.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100), ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.2)
    return figure
