"""What tests share: rows of a device that does not exist, the command, what is recorded."""

from collections.abc import Iterable
from pathlib import Path

import torch
from typer.testing import CliRunner

from bench.cases import Case
from bench.commands import app
from bench.contenders import Contender, contenders_for
from bench.measure.run import measure
from bench.measure.verify import Expectation
from bench.measurements import Measurements
from bench.results import Environment, ResultsFile, WrongResultError, read_results

CPU, MADE_UP = torch.device("cpu"), "made-up device"
RATES = {"linear": {"flops", "bandwidth"}, "conv": {"flops", "bandwidth"}}
RATES |= {"weights": {"bandwidth"}, "model": {"bandwidth"}, "step": {"throughput"}}


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


def bench(*arguments: object) -> tuple[int, str]:
    """Run `python -m bench` in this process; return its exit code and what it prints."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def recorded(contender: Contender, expectation: Expectation) -> list:
    """Measure a contender; return (pass, metric, value) of all, then "raised" if it is wrong."""
    found = []
    try:
        measure(contender, expectation, lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


def check_figures(case: Case, device: torch.device, compiled: bool = False) -> None:
    """Assert that every pass of every contender has what is measured there, and nothing else."""
    expectation, on_gpu = Expectation(case, device), device.type == "cuda"
    for one in contenders_for(case, compiled):
        found = recorded(one, expectation)
        if on_gpu and one.name in ("fused", "mixed") and found[0][:2] == ("", "skipped"):
            continue  # not every convolution has fused products
        for name in one.passes:
            expected = {"time", "spread", *RATES.get(name, RATES[case.op])}
            expected |= {"saved"} if name == "forward" else set()  # of a layer
            if on_gpu:
                expected |= {"memory", "launches" if case.op == "model" else "host_time"}
            if on_gpu and one.graphable:
                expected |= {"graph_time", *["graph_throughput"] * (name == "step")}
            metrics = {metric for where, metric, _ in found if where == name}
            assert metrics == expected, (one.name, name, found)
        assert all(value > 0 for _, metric, value in found if metric == "time")
