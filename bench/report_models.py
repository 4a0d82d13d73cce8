"""Tables of whole training steps and of streaming through whole models' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .cases import ListCase, ModelCase
from .ceilings import COPY
from .list_providers import LIST_PASSES
from .measurements import Measurements
from .model_providers import MODEL_PROVIDERS, STEP
from .tables import Section, duration, markdown_table, mean_text, ratio_text

__all__ = ["list_tables", "model_tables", "readme_model_table"]

_OTHERS = [provider.name for provider in MODEL_PROVIDERS if provider.name != "dense"]
_PASS_TITLES = {
    "pack": "Pack all weights",
    "post": "Gradients of all weights and thresholds (post)",
    "sgd": "Deferred step of SGD with momentum",
    "adamw": "Deferred step of AdamW",
}
_MODES = {"time": "eager", "graph_time": "graph"}
_NOT_MEASURED = "Not measured."


def model_tables(measurements: Measurements) -> list[Section]:
    """(title, table) for time, throughput, launches and memory; nothing without whole models."""
    cases = _cases(measurements, ModelCase)
    if not cases:
        return []
    return [
        ("Whole training step, eager (wall clock)", _ratios(measurements, "time", duration)),
        ("Whole training step, CUDA graph", _ratios(measurements, "graph_time", duration)),
        ("Whole training step, images or tokens per second", _throughput(measurements)),
        ("Whole training step, launches", _launches(measurements)),
        ("Whole training step, peak memory", _ratios(measurements, "memory", _gigabytes)),
    ]


def _ratios(measurements: Measurements, metric: str, text: Callable[[float], str]) -> str:
    """Dense as it is, the others over it."""
    lines, values = [], []
    for case in _cases(measurements, ModelCase):
        dense = measurements.newest(case.name, "dense", STEP, metric)
        if dense is None:
            continue
        ratios = [measurements.ratio(case.name, STEP, metric, name, "dense") for name in _OTHERS]
        values.append(ratios)
        lines.append([*_about(case), text(dense), *map(ratio_text, ratios)])
    if not lines:
        return _NOT_MEASURED
    means = map(mean_text, zip(*values, strict=True))
    head = ["model", "batch", "dtype", "dense", *(f"{name} ÷ dense" for name in _OTHERS)]
    return markdown_table(head, [*lines, ["geometric mean", "", "", "", *means]])


def _throughput(measurements: Measurements) -> str:
    """The better of eager and graph."""

    def text(case: ModelCase, name: str) -> str:
        metrics = ("throughput", "graph_throughput")
        both = [measurements.newest(case.name, name, STEP, metric) for metric in metrics]
        return _whole(max((value for value in both if value is not None), default=None))

    return _figures(measurements, text)


def _launches(measurements: Measurements) -> str:
    return _figures(
        measurements,
        lambda case, name: _whole(measurements.newest(case.name, name, STEP, "launches")),
    )


def _figures(measurements: Measurements, text: Callable[[ModelCase, str], str]) -> str:
    """Everybody's own figure of each model."""
    names = ("dense", *_OTHERS)
    lines = [
        (_about(case), [text(case, name) for name in names])
        for case in _cases(measurements, ModelCase)
    ]
    lines = [[*about, *texts] for about, texts in lines if set(texts) != {"-"}]
    if not lines:
        return _NOT_MEASURED
    return markdown_table(["model", "batch", "dtype", *names], lines)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def list_tables(measurements: Measurements) -> list[Section]:
    """(title, table) for each pass; nothing without lists of weights."""
    tables = []
    for name in LIST_PASSES:
        lines = []
        for case in _cases(measurements, ListCase):
            ours = measurements.newest(case.name, "auto", name, "time")
            if ours is None:
                continue
            lines.append(
                [
                    case.weights,
                    case.dtype,
                    duration(measurements.newest(case.name, "auto", name, "graph_time") or ours),
                    ratio_text(measurements.time_ratio(case.name, name, "auto", "dense")),
                    ratio_text(
                        measurements.share_of_ceiling(case.name, "auto", name, "bandwidth", COPY)
                    ),
                ]
            )
        if lines:
            head = ["weights", "dtype", "ours", "÷ dense", "of copy bandwidth"]
            tables.append((_PASS_TITLES[name], markdown_table(head, lines)))
    return tables


def readme_model_table(measurements: Measurements) -> str | None:
    """Our ways over the others, in short; None where nothing is measured."""
    columns = {
        f"{name}, {mode} ÷ dense": (metric, name, "dense")
        for name in ("deferred", "grouped")
        for metric, mode in _MODES.items()
    }
    columns["masked ÷ dense, compiled"] = ("time", "masked_compiled", "dense_compiled")
    columns["deferred ÷ eager DST"] = ("time", "deferred", "dst_eager")
    columns["masked ÷ DST, compiled"] = ("time", "masked_compiled", "dst_compiled")
    columns["memory, deferred ÷ dense"] = ("memory", "deferred", "dense")
    lines = []
    for case in _cases(measurements, ModelCase):
        dense = measurements.newest(case.name, "dense", STEP, "time")
        if dense is None:
            continue
        ratios = [measurements.ratio(case.name, STEP, *figure) for figure in columns.values()]
        launches = _more_launches(measurements, case)
        more = "-" if launches is None else f"{launches:+.0f}"
        lines.append([case.model, str(case.batch), duration(dense), *map(ratio_text, ratios), more])
    if not lines:
        return None
    return markdown_table(["model", "batch", "dense", *columns, "more launches"], lines)


def _more_launches(measurements: Measurements, case: ModelCase) -> float | None:
    return measurements.difference(case.name, STEP, "launches", "deferred", "dense")


def _cases(measurements: Measurements, kind: type) -> Iterable:
    return [case for case in measurements.cases.values() if isinstance(case, kind)]


def _about(case: ModelCase) -> list[str]:
    return [case.model, str(case.batch), case.dtype]


def _gigabytes(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
