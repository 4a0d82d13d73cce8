"""Figures as pictures, made without pyplot: no display and no global state."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

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
        write_whole(paths[-1], lambda file, figure=figure: figure.savefig(file, dpi=120))
    return paths + _draw_curves(found, names["training"], folder)


def _draw_curves(found: Measurements, names: list[str], folder: Path) -> list[Path]:
    """Draw steps over dense by the share of weights that remain, where three shares or more are."""
    panels: dict[str, list] = defaultdict(list)
    for case in found.cases.values():
        if case.op == "training":
            panels[f"{case.model}, threads: {case.threads}"].append(case)
    panels = {title: cases for title, cases in panels.items() if len(cases) > 2}
    if not panels:
        return []
    figure = Figure((4 * len(panels) + 2, 4), layout="constrained")
    figure.suptitle(f"Training step ÷ dense: below 1 is faster\n{found.gpu}")
    drawn = {}
    for axes, (title, cases) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, color in zip(names, itertools.cycle(_COLORS)):
            ratios = {
                c.remaining_ratio: found.time_ratio(c.name, "step", name, "dense") for c in cases
            }
            line = sorted((100 * share, ratio) for share, ratio in ratios.items() if ratio)
            if line:
                (drawn[name],) = axes.plot(
                    *zip(*line, strict=True), "o-", color=color, markersize=4
                )
        axes.axhline(1.0, color="#222222", linewidth=1)
        axes.set(title=title, xlabel="remaining weights, %", xscale="log", ylim=(0, 2))
        axes.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100), ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.2)
    figure.legend(drawn.values(), drawn, loc="outside right upper", frameon=False, fontsize=8)
    path = folder / f"{slug(found.gpu)}-training.png"
    write_whole(path, lambda file: figure.savefig(file, dpi=120))
    return [path]
