"""Rows that nobody measured, of a device that does not exist, for what reads rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.cases import Case
from bench.measurements import Measurements
from bench.results import Environment, ResultsFile, read_results

MADE_UP = "made-up device"


def environment(gpu: str = MADE_UP, date: str = "2000-01-01T00:00:00Z") -> Environment:
    return Environment(gpu, "2.99", "3.99", "abc", date)


def write_rows(path: Path, figures: Iterable[tuple], here: Environment | None = None) -> Path:
    """`figures`: (case, contender, pass, metric, value), case a Case or a ceiling's name."""
    with ResultsFile(path, here or environment()) as file:
        for figure in figures:
            file.add("linear", *figure)
    return path


def measured(path: Path, figures: Iterable[tuple], gpu: str = MADE_UP) -> Measurements:
    return Measurements(gpu, read_results(write_rows(path, figures, environment(gpu))))


def ceilings(bandwidth: float = 1e12, flops: float = 1e14) -> list[tuple]:
    figures = ("copy", bandwidth, "bandwidth"), ("gemm", flops, "flops")
    return [(name, "ceiling", "forward", metric, value) for name, value, metric in figures]


def times(case: Case, pass_name: str, metric: str = "time", **figures: float) -> list[tuple]:
    return [(case, name, pass_name, metric, value) for name, value in figures.items()]
