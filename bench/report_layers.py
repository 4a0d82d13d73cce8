"""Tables of single layers and of the weight side alone."""

from __future__ import annotations

from collections.abc import Callable

from .cases import CONV, LINEAR, MASKED_WEIGHT, LayerCase
from .ceilings import COPY
from .kinds import all_names
from .measurements import COMPILED_DST, Measurements
from .providers import PASSES, PIECES
from .tables import Section, duration, markdown_table, mean_text, ratio_text

__all__ = ["layer_tables", "readme_layer_table"]

_LAYERS = {LINEAR: "Linear", CONV: "Convolution"}
_OF_LAYERS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward and backward",
    "step": "step with AdamW (wall clock)",
    "grad_input": "gradient of the input",
    "grad_weight": "gradient of weight and threshold",
}
_TITLES = {
    **{
        (op, name): f"{layer}, {of_layer}"
        for op, layer in _LAYERS.items()
        for name, of_layer in _OF_LAYERS.items()
    },
    (MASKED_WEIGHT, "forward"): "Masked weight, forward (pack)",
    (MASKED_WEIGHT, "backward"): "Masked weight, backward (post)",
}
_HEADS = {
    LINEAR: ("M", "N", "K"),
    CONV: ("batch", "side", "C", "N", "kernel", "stride", "groups"),
    MASKED_WEIGHT: ("M", "N", "K"),
}


def layer_tables(measurements: Measurements) -> list[Section]:
    """(title, table) for each op and pass that was measured."""
    found = []
    for op in _HEADS:
        for pass_name in (*PASSES, *PIECES):
            if table := _table(measurements, op, pass_name):
                found.append((_TITLES[op, pass_name], table))
    return found


def _about(case: LayerCase) -> list[str]:
    return [str(getattr(case, name) or "-") for name in _HEADS[case.op]]


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
    columns: dict[str, Callable[[LayerCase], float | None]] = {
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
    head = [*_HEADS[op], "dtype", "dense", *columns]
    values = [[of_case(case) for of_case in columns.values()] for case in cases]
    lines = []
    for case, ratios in zip(cases, values, strict=True):
        dense = duration(measurements.newest(case.name, "dense", pass_name, "time"))
        lines.append([*_about(case), case.dtype, dense, *map(ratio_text, ratios)])
    means = map(mean_text, zip(*values, strict=True))
    lines.append(["geometric mean", *[""] * (len(_HEADS[op]) + 1), *means])
    return markdown_table(head, lines)


def readme_layer_table(measurements: Measurements, op: str) -> str | None:
    """Ours over the others, in short; None where nothing is measured."""
    cases = [
        case
        for case in measurements.cases.values()
        if case.op == op
        and case.dtype == "bf16-autocast"
        and measurements.newest(case.name, "dense", "forward_backward", "time")
    ]
    if not cases:
        return None
    values = [_summary_of(measurements, case) for case in cases]
    lines = [
        [
            *_in_short(case),
            duration(measurements.newest(case.name, "dense", "forward_backward", "time")),
            *map(ratio_text, ratios),
        ]
        for case, ratios in zip(cases, values, strict=True)
    ]
    means = [mean_text(column) for column in zip(*values, strict=True)]
    about = {LINEAR: ["tokens", "weight"], CONV: ["images", "weight"]}[op]
    head = [*about, "dense", "÷ dense", "÷ compiled DST", "÷ eager DST", "memory"]
    return markdown_table(head, [*lines, ["geometric mean", "", "", *means]])


def _in_short(case: LayerCase) -> tuple[str, str]:
    """How much goes in, and through which weight."""
    if case.op == LINEAR:
        return str(case.M), f"{case.N} x {case.K}"
    stride = f", stride {case.stride}" if case.stride > 1 else ""
    groups = f", {case.groups} groups" if case.groups > 1 else ""
    weight = f"{case.C} to {case.N}, {case.kernel}x{case.kernel}{stride}{groups}"
    return f"{case.batch} of {case.side}x{case.side}", weight


def _summary_of(measurements: Measurements, case: LayerCase) -> list[float | None]:
    others = ("dense", COMPILED_DST, "dst_eager")
    times = [
        measurements.time_ratio(case.name, "forward_backward", "auto", other) for other in others
    ]
    return [
        *times,
        measurements.ratio(case.name, "forward_backward", "memory", "auto", "dense"),
    ]
