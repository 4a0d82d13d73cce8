"""Goals: met, missed, not measured; of a GPU on a GPU's figures, of a CPU on a CPU's."""

import io

from made_up_rows import ceilings, measured, times
from rich.console import Console

from bench.cases import ModelCase, WeightsCase
from bench.report import goals
from bench.suites import SUITES

BOTH, FIRST, CONV = "forward_backward", SUITES["linear"].cases[0], SUITES["conv"].cases[5]
VGG, LSTM, LARGE = ModelCase("vgg-16", 128), ModelCase("lstm-a", 100), WeightsCase("8192x8192")
STEP = {"dense": 1.0, "deferred": 0.85, "grouped": 1.01, "masked": 1.1, "dst_compiled": 1.1}
STEP |= {"dense_compiled": 1.0, "deferred_compiled": 0.95, "masked_compiled": 1.01}
LABEL = "linear: auto ÷ dense, time of forward backward"


def _good(skip=None):
    """Yield figures by which every goal for a GPU is met, without those of one case."""
    yield from ceilings(bandwidth=1000.0)
    for case in (c for name in goals.SUITES for c in SUITES[name].cases if c != skip):
        yield from times(case, "step", dst_eager=60.0 if case == LSTM else 2.5, **STEP)
        yield from times(case, "step", "graph_time", **STEP)
        yield from times(case, "step", "memory", dense=9, deferred=9, grouped=9, masked=9)
        yield from times(case, "step", "launches", dense=100, deferred=103)
        for name in ("optimizer", "pack", "post"):
            yield from times(case, name, "bandwidth", deferred=950.0, auto=950.0)
        yield from times(case, BOTH, dense=1.0, auto=0.9, dst_compiled=1.1, dst_eager=2.5)
        yield from times(case, BOTH, "memory", auto=9, dense=9)
        for name in ("forward", BOTH, "grad_weight"):
            yield from times(case, name, "host_time", auto=14e-6, dense=10e-6)
            yield from times(case, name, gemm=0.9, fused=0.95, packed=1.0)
        yield from times(case, "forward", "saved", auto=9)


def _check(path, figures, gpu="made-up device"):
    console = Console(file=io.StringIO(), width=200)
    verdicts = goals.check_goals(measured(path / "results.csv", figures, gpu), console)
    return verdicts, " ".join(console.file.getvalue().split())


MISSES = [
    (FIRST, "auto", BOTH, "time", 1.09, "linear: auto ÷ dense, time of forward backward, worst"),
    (FIRST, "dst_compiled", BOTH, "time", 0.87, "linear: auto ÷ dst compiled, time of forward"),
    (FIRST, "auto", "forward", "saved", 2**26, "linear: saved for backward"),
    (FIRST, "auto", "forward", "host_time", 2e-5, "linear up to 1k tokens: auto ÷ dense, host"),
    (
        WeightsCase("8192x8192"),
        "auto",
        "pack",
        "bandwidth",
        890.0,
        "16 M weights or more: auto pack",
    ),
    (CONV, "fused", "grad_weight", "time", 1.1, "1x1 and small-image convolutions: fused ÷ packed"),
    (VGG, "deferred", "step", "time", 1.01, "feedforward models: deferred ÷ dense, eager, worst"),
    (VGG, "grouped", "step", "graph_time", 1.06, "small models: grouped ÷ dense, graph, worst"),
    (VGG, "dst_compiled", "step", "graph_time", 0.89, "CIFAR models: best of masked compiled"),
    (VGG, "deferred", "step", "launches", 104, "feedforward models: launches of deferred"),
    (LSTM, "masked", "step", "graph_time", 1.2, "lstm-a: masked ÷ dense, graph"),
]


def test_all_met_and_one_bad_case_misses_its_goal(tmp_path):
    assert len({goal.title for goal in goals.GOALS}) == len(goals.GOALS)
    verdicts, printed = _check(tmp_path, _good())
    assert {*verdicts.values()} == {goals.MET} and len(verdicts) == len(goals.GOALS) - 1
    assert "Goals, made-up device" in printed and "LeNet-300-100" not in printed, "which is a CPU's"
    for index, (*figure, missed) in enumerate(MISSES):
        verdicts, _ = _check(tmp_path / str(index), [*_good(), figure])
        (title,) = (title for title, verdict in verdicts.items() if verdict == goals.MISSED)
        assert title.startswith(missed)


def test_means_and_missing_cases(tmp_path):
    slower = [row for case in SUITES["linear"].cases for row in times(case, BOTH, auto=1.01)]
    verdicts, _ = _check(tmp_path / "mean", [*_good(), *slower])
    assert (verdicts[f"{LABEL}, mean"], verdicts[f"{LABEL}, worst"]) == (goals.MISSED, goals.MET)
    verdicts, printed = _check(tmp_path / "one", _good(skip=FIRST))
    assert verdicts[f"{LABEL}, mean"] == verdicts[f"{LABEL}, worst"] == goals.NOT_MEASURED
    assert f"1 of 25 cases missing: {FIRST.name}" in printed
    verdicts, _ = _check(tmp_path / "two", times(FIRST, BOTH, auto=2.0, dense=1.0))
    assert verdicts[f"{LABEL}, mean"] == goals.NOT_MEASURED
    assert verdicts[f"{LABEL}, worst"] == goals.MISSED


def test_a_cpu_is_held_against_its_own_goals(tmp_path):
    lenet = ModelCase("lenet-300-100", 64, dtype="fp32")
    for seconds, verdict in (1.2, goals.MET), (1.3, goals.MISSED):
        rows = [*times(lenet, "step", dense=1.0, deferred=seconds), *_good()]
        verdicts, printed = _check(tmp_path / verdict, rows, "cpu: Made up")
        assert verdicts == {"LeNet-300-100: deferred ÷ dense, eager": verdict}
        assert f"{verdict} {seconds:.3f} ≤ 1.25" in printed
