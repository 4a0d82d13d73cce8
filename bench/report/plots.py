"""Figures as pictures, made without pyplot: no display and no global state."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..measurements import Measurements
from ..results import slug, write_with

_COLORS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
_COLORS += ("#882255", "#999933", "#56b4e9", "#6a51a3", "#8c6d46")
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
_TITLES = {
    "linear": ("forward_backward", "Linear layers, forward and backward"),
    "conv": ("forward_backward", "Convolutions, forward and backward"),
    "weights": ("post", "Gradients of weights and thresholds"),
    "model": ("step", "Whole training steps"),
}


def write_plots(found: Measurements, names: dict[str, list[str]], folder: Path) -> list[Path]:
    """Draw times over dense, eager or as a CUDA graph, in a PNG for each op; return their paths.

    `names` are the contenders of each op but dense; their order decides the colours.
    """
    paths = []
    for op, (pass_name, title) in _TITLES.items():
        cases = [case for case in found.cases.values() if case.op == op][::-1]
        points: dict[str, list[tuple[float, int]]] = {name: [] for name in names[op]}
        for name, (place, case) in itertools.product(points, enumerate(cases)):
            if ratio := found.ratio(case.name, pass_name, ("time", "graph_time"), name, "dense"):
                points[name].append((ratio, place))
        if not any(points.values()):
            continue
        figure = Figure((8, 1.8 + 0.28 * len(cases)), layout="constrained")
        axes = figure.add_subplot()
        for (name, line), color in zip(points.items(), itertools.cycle(_COLORS)):
            if line:
                marker = "D" if name.startswith("dst_") else "o"
                axes.scatter(*zip(*line, strict=True), s=28, color=color, marker=marker, label=name)
        axes.axvline(1.0, color="#222222", linewidth=1)
        axes.set(title=f"{title}\n{found.gpu}", xlabel="time ÷ dense: left is faster", xscale="log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(cases)), [case.name.removeprefix(f"{op}-") for case in cases])
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="both", alpha=0.2)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        paths.append(folder / f"{slug(found.gpu)}-{op}.png")
        write_with(paths[-1], lambda path, figure=figure: figure.savefig(path, dpi=120))
    return paths
