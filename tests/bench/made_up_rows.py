"""Rows that nobody measured, of a device that does not exist, for what reads rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.cases import Case
from bench.environment import Environment
from bench.results import ResultsFile, Run

MADE_UP = "made-up device"


def environment(gpu: str = MADE_UP, date: str = "2000-01-01T00:00:00Z") -> Environment:
    return Environment(gpu, "2.99", "3.99", "abc", date)


def write_rows(path: Path, figures: Iterable[tuple], here: Environment | None = None) -> Path:
    """`figures`: (case, provider, pass, metric, value), case a Case or a ceiling's name."""
    with ResultsFile(path) as file:
        run = Run(file, here or environment())
        for case, provider, pass_name, metric, value in figures:
            run.add("linear", case, provider, pass_name, metric, value)
    return path


def ceilings(bandwidth: float = 1e12, flops: float = 1e14) -> list[tuple]:
    return [
        ("copy", "ceiling", "forward", "bandwidth", bandwidth),
        ("gemm", "ceiling", "forward", "flops", flops),
    ]


def times(case: Case, pass_name: str, **seconds: float) -> list[tuple]:
    """The metric `time` of several providers."""
    return [(case, name, pass_name, "time", value) for name, value in seconds.items()]
