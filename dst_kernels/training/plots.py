"""Draw pictures of runs, without pyplot: that needs neither a display nor global state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from .files import Record, write_atomically
from .masks import was_restarted
from .tasks import CLASSIFICATION, Task

_FEW = 8  # at most so many lines get a hue each
_MOST_NAMED = 27  # at most so many lines are in the legend
_DARK, _GRAY = "#222222", "#767676"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999933", "#882255")
_SHARES = (1e-3, 1 - 1e-4)  # a logit scale shows neither 0 nor 1
_TICKS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)
_LEAST_SHOWN = 1e-4  # stands for 0, which a log scale cannot show


class Curve(NamedTuple):
    """Hold one run in a plot of several."""

    label: str
    history: Sequence[Record]
    dense: bool


def plot_layer_ratios(
    path: Path, history: Sequence[Record], title: str, *, guarded: bool = True
) -> None:
    """Draw the remaining ratio of every layer, and of the model, over the epochs.

    With `guarded`, mark where the collapse guard has restarted a layer.
    """
    figure, axes = _figure(title, 1)
    names = list(history[0]["layers"])
    epochs = [record["epoch"] for record in history]
    stride, marked = -(-len(names) // _MOST_NAMED), 0
    for index, (name, color) in enumerate(zip(names, _colors(len(names)), strict=True)):
        ratios = [record["layers"][name] for record in history]
        label = f"{name}  {_percent(ratios[-1])}" if index % stride == 0 else None
        axes[0].plot(epochs, _shown(ratios), color=color, label=label, **_marker(epochs))
        restarts = [
            i for i in range(1, len(ratios)) if guarded and was_restarted(*ratios[i - 1 : i + 1])
        ]
        marked += len(restarts)
        points = [epochs[i] for i in restarts], [ratios[i] for i in restarts]
        axes[0].plot(*points, "^", color=color, markersize=7)
    ratios = [record["remaining_ratio"] for record in history]
    axes[0].plot(
        epochs, _shown(ratios), color=_DARK, linewidth=2.6, label=f"model  {_percent(ratios[-1])}"
    )
    _ratio_axis(axes[0])
    _epoch_axis(axes[0])
    if marked:
        axes[0].set_xlabel("epoch\n▲ restarted by the collapse guard")
    _mark_drops(axes, history)
    columns = -(-(len(names) // stride + 1) // 28)
    axes[0].legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        ncols=columns,
        fontsize="medium" if len(names) <= _FEW else "x-small",
        title="at the end",
    )
    _save(figure, path)


def plot_masks(path: Path, history: Sequence[Record], title: str) -> None:
    """Draw what share of the masks changed in each epoch, and what is and ever was kept."""
    figure, (churn, kept) = _figure(title, 2)
    epochs = [record["epoch"] for record in history]
    changes = _shown([record["churn"] for record in history])
    churn.plot(epochs, changes, color=_PALETTE[0], **_marker(epochs))
    churn.set_yscale("log")
    churn.set_ylabel("mask bits changed")
    _log_percent(churn.yaxis)
    for name, label, color in (
        ("ever_active", "ever kept", _PALETTE[2]),
        ("remaining_ratio", "remaining", _PALETTE[1]),
    ):
        values = [record[name] for record in history]
        kept.plot(epochs, _shown(values), color=color, label=f"{label}  {_percent(values[-1])}",
                  **_marker(epochs))  # fmt: skip
    _ratio_axis(kept)
    kept.set_ylabel("share of the weights")
    kept.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title="at the end")
    dead = history[-1]["dead_rows"]
    _epoch_axis(kept)
    kept.set_xlabel(f"epoch\nrows and filters without a weight at the end: {dead:,.0f}")
    _mark_drops((churn, kept), history)
    _save(figure, path)


def _mark_drops(axes: Sequence[Axes], history: Sequence[Record]) -> None:
    """Draw a line where the learning rate has dropped, and its new value above the first axis."""
    for before, record in itertools.pairwise(history):
        if record["lr"] < before["lr"]:
            for axis in axes:
                axis.axvline(before["epoch"], color=_GRAY, linewidth=0.9, linestyle=":")
            axes[0].annotate(
                f"lr {record['lr']:g}",
                (before["epoch"], 1.0),
                xycoords=axes[0].get_xaxis_transform(),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize="x-small",
                color=_GRAY,
            )


def plot_quality_and_ratio(path: Path, history: Sequence[Record], title: str, task: Task) -> None:
    """Draw the task's measure of quality, and below it the remaining ratio, over the epochs."""
    figure, axes = _figure(title, 2)
    epochs = [record["epoch"] for record in history]
    for axis, name, color in zip(axes, (task.key, "remaining_ratio"), _PALETTE, strict=False):
        values = [record[name] for record in history]
        shown = values if name == task.key else _shown(values)
        axis.plot(epochs, shown, color=color, **_marker(epochs))
        axis.plot(epochs[-1], shown[-1], "o", color=color)
        axis.annotate(
            task.show(values[-1], ".3g") if name == task.key else _percent(values[-1]),
            (epochs[-1], shown[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
            annotation_clip=False,
        )
    _quality_axis(axes[0], [history], task)
    _ratio_axis(axes[1])
    _epoch_axis(axes[1])
    _mark_drops(axes, history)
    _save(figure, path)


def plot_thresholds(path: Path, thresholds: Mapping[str, np.ndarray], title: str) -> None:
    """Draw a histogram of each layer's thresholds, one row per layer, the first layer on top."""
    figure, (axis,) = _figure(title, 1, height=max(2.2 + 0.55 * len(thresholds), 3.6))
    finite = [values[np.isfinite(values)] for values in thresholds.values()]
    largest = max((values.max() for values in finite if len(values)), default=0.0)
    least = min((values.min() for values in finite if len(values)), default=0.0)
    margin = 0.05 * (largest - least) or 0.05
    edges = np.linspace(least - margin, largest + margin, 81)
    labels = []
    for row, (name, values, color) in enumerate(
        zip(thresholds, finite, _colors(len(thresholds)), strict=True)
    ):
        if len(values):
            counts, _ = np.histogram(values, edges)
            heights = 0.8 * np.sqrt(counts / counts.max())
            axis.stairs(row - heights, edges, baseline=row, fill=True, color=color, alpha=0.75)
            axis.plot(np.median(values), row + 0.07, "^", color=_DARK, markersize=6)
        axis.axhline(row, color=color, linewidth=0.8)
        labels.append(f"{name}  ({len(thresholds[name]):,})")
    axis.axvline(0, color=_GRAY, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.8, -1)
    axis.set_xlim(edges[0], edges[-1])
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("threshold\nheight: root of the count, each layer to its own scale; ▲ median")
    _save(figure, path)


def plot_runs(path: Path, curves: Sequence[Curve], title: str, task: Task) -> None:
    """Draw quality and ratio of several runs over the epochs, and final quality over ratio."""
    figure = Figure(figsize=(12.5, 4.6), layout="constrained", dpi=140)
    figure.suptitle(_plain(title), x=0.01, ha="left", weight="bold")
    quality, ratio, end = figure.subplots(1, 3)
    for curve, color in zip(curves, _colors(len(curves)), strict=True):
        if not curve.history:
            continue
        epochs = [record["epoch"] for record in curve.history]
        qualities = [record[task.key] for record in curve.history]
        ratios = _shown([record["remaining_ratio"] for record in curve.history])
        style = "--" if curve.dense else "-"
        quality.plot(epochs, qualities, style, color=color, **_marker(epochs))
        ratio.plot(epochs, ratios, style, color=color, label=_plain(curve.label), **_marker(epochs))
        end.plot(
            ratios[-1],
            qualities[-1],
            "s" if curve.dense else "o",
            color=color,
            markersize=8,
            markerfacecolor="none" if curve.dense else color,
        )
    _quality_axis(quality, [curve.history for curve in curves if curve.history], task)
    _ratio_axis(ratio)
    _epoch_axis(quality)
    _epoch_axis(ratio)
    end.set_xscale("log")
    _log_percent(end.xaxis)
    end.set_xlabel("remaining ratio at the end")
    end.set_ylabel(f"test {task.quality} at the end")
    end.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.show(value, ".3g")))
    end.margins(0.12)
    _tidy(end)
    figure.legend(
        *ratio.get_legend_handles_labels(),
        loc="outside lower left",
        frameon=False,
        ncols=min(len(curves), 3),
        fontsize="small",
    )
    _save(figure, path)


class Point(NamedTuple):
    """Hold the means over the seeds, and standard deviations, at one value of a sweep's option."""

    value: float | str
    quality: float
    quality_spread: float
    ratio: float
    ratio_spread: float
    layers: Mapping[str, float]


def plot_sweep(path: Path, points: Sequence[Point], option: str, title: str, task: Task) -> None:
    """Draw quality and remaining ratio over the option's values, with standard deviations."""
    figure, (quality, ratio) = _figure(title, 2)
    values = [point.value for point in points]
    for axis, name, color in zip((quality, ratio), ("quality", "ratio"), _PALETTE, strict=False):
        means = np.array([getattr(point, name) for point in points])
        spreads = np.array([getattr(point, f"{name}_spread") for point in points])
        low = means - spreads
        if name == "ratio":
            means, low = np.maximum(means, _LEAST_SHOWN), np.maximum(low, _LEAST_SHOWN)
        axis.fill_between(values, low, means + spreads, color=color, alpha=0.2, linewidth=0)
        axis.plot(values, means, color=color, marker="o", markersize=5)
    quality.set_ylabel(f"test {task.quality}")
    quality.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.show(value, ".3g")))
    _ratio_axis(ratio)
    ratio.set_xscale("log")
    ratio.set_xlabel(f"{option}\nbands: standard deviation over the seeds")
    _save(figure, path)


def plot_methods(path: Path, lines: Mapping[str, Sequence[Point]], title: str, task: Task) -> None:
    """Draw quality over the remaining ratio, a line for each method, with standard deviations."""
    figure, (axis,) = _figure(title, 1)
    for (name, points), style in zip(lines.items(), _styles([*lines]), strict=True):
        points = sorted(points, key=lambda point: point.ratio)
        ratios = _shown([point.ratio for point in points])
        means = np.array([point.quality for point in points])
        spreads = np.array([point.quality_spread for point in points])
        if task is CLASSIFICATION:
            means = means.clip(*_SHARES)
            spreads = np.minimum(spreads, np.minimum(means, 1 - means) / 2)
        axis.plot(ratios, means, label=name, **style)
        if len(points) > 1:
            low, high = means - spreads, means + spreads
            axis.fill_between(ratios, low, high, color=style["color"], alpha=0.13, linewidth=0)
        else:
            axis.errorbar(ratios, means, spreads, color=style["color"], capsize=3)
    if task is CLASSIFICATION:  # good methods differ by parts of a percent, bad ones by many
        axis.set_yscale("logit", nonpositive="clip")
        axis.yaxis.set_major_locator(FixedLocator(_TICKS))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xscale("log")
    _log_percent(axis.xaxis)
    axis.set_xlabel("remaining ratio\nbands: standard deviation over the seeds")
    axis.set_ylabel(f"test {task.quality}")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.show(value, ".3g")))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="method")
    _save(figure, path)


def shown_value(value: float | str) -> str:
    """Return a value of an option as text."""
    return value if isinstance(value, str) else f"{value:g}"


def plot_layer_pattern(path: Path, points: Sequence[Point], option: str, title: str) -> None:
    """Draw the remaining ratio of each layer, a line for each of the option's values."""
    figure, (axis,) = _figure(title, 1)
    for point, style in zip(points, _styles([point.value for point in points]), strict=True):
        ratios = _shown([*point.layers.values()])
        axis.plot(range(len(ratios)), ratios, label=shown_value(point.value), **style)
    names = list(points[0].layers)
    stride = -(-len(names) // _MOST_NAMED)
    shown = range(0, len(names), stride)
    long = max(map(len, names)) * len(shown) > 90
    axis.set_xticks(shown, [names[i] for i in shown], rotation=90 if long else 0)
    _ratio_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=option)
    _save(figure, path)


def _figure(title: str, rows: int, height: float = 5.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.6, height), layout="constrained", dpi=140)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    axes = list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))
    for axis in axes:
        _tidy(axis)
    return figure, axes


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _colors(count: int) -> list[object]:
    """Return distinct hues for a few lines, or an ordered scale for many."""
    if count <= _FEW:
        return list(_PALETTE[:count])
    return list(colormaps["viridis"](np.linspace(0, 0.92, count)))


def _styles(values: Sequence[float | str]) -> list[dict[str, Any]]:
    """Return a line's style for each value of a sweep's option: numbers in order, or methods."""
    if not isinstance(values[0], str):
        return [{"color": color, "marker": "o", "markersize": 5} for color in _colors(len(values))]
    others = zip(itertools.cycle(_PALETTE), itertools.cycle("sD^v<>PX"), strict=False)
    ours = {"color": _DARK, "marker": "o", "markersize": 6, "linewidth": 2.6, "zorder": 3}
    return [
        ours if value == "dst" else dict(zip(("color", "marker"), next(others), strict=True))
        for value in values
    ]


def _marker(epochs: Sequence[int]) -> dict[str, Any]:
    """Return the style of points, which only curves of at most three epochs have."""
    return {"marker": "o", "markersize": 4} if len(epochs) <= 3 else {}


def _shown(ratios: Sequence[float]) -> list[float]:
    return [max(ratio, _LEAST_SHOWN) for ratio in ratios]


def _percent(share: float, _position: object = None) -> str:
    return f"{100 * share:.3g} %"


def _epoch_axis(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    low, high = axis.get_xlim()
    if high - low < 1:  # a single epoch
        axis.set_xlim(low - 0.5, high + 0.5)
    _tidy(axis)


def _ratio_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylabel("remaining ratio")
    axis.set_ylim(top=1.15)
    _log_percent(axis.yaxis)
    _tidy(axis)


def _log_percent(axis: XAxis | YAxis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(_percent))
    axis.set_minor_formatter(NullFormatter())


def _quality_axis(axis: Axes, histories: Sequence[Sequence[Record]], task: Task) -> None:
    """Scale the axis to the values after the first tenth of the epochs."""
    settled = [
        record[task.key] for history in histories for record in history[len(history) // 10 :]
    ]
    low, high = min(settled), max(settled)
    margin = 0.08 * (high - low) or 0.01
    axis.set_ylim(low - margin, high + margin)
    axis.set_ylabel(f"test {task.quality}")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.show(value, ".3g")))
    _tidy(axis)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # or matplotlib reads what is between two as mathematics


def _save(figure: Figure, path: Path) -> None:
    # Without matplotlib's own metadata equal runs give equal files.
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(path, lambda file: file.write(picture.getvalue()))
