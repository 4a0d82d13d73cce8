"""Goals: met, missed, not measured; of a GPU on one GPU's rows, of a CPU on a CPU's."""

from __future__ import annotations

import pytest
from made_up_rows import ceilings, environment, times, write_rows
from typer.testing import CliRunner

from bench.cases import Case, ConvCase, ListCase, ModelCase
from bench.check import choose_devices
from bench.commands import app
from bench.errors import UsageError
from bench.goal import MET, MISSED, NOT_MEASURED
from bench.goals import GOALS
from bench.measurements import Measurements
from bench.results import read_results
from bench.suites import SUITES

ALL = tuple(
    case
    for name in ("linear", "conv", "streaming", "steps", "model")
    for case in SUITES[name].cases
)
FIRST = SUITES["linear"].cases[0]
VGG = ModelCase("vgg-16", 128, "bf16-autocast")
LSTM = ModelCase("lstm-a", 100, "bf16-autocast")
RESNET_50 = ModelCase("resnet-50", 256, "bf16-autocast")
LAYER_1K = ModelCase("linear-4096", 1024, "bf16-autocast")
RESNET = ListCase("resnet-50", "bf16-autocast")
LENET_ON_CPU = ModelCase("lenet-300-100", 64, "fp32")


def _good(skip=()):
    """Figures by which every goal for a GPU is met, without those of the cases in `skip`."""
    yield from ceilings(bandwidth=1000.0)
    for case in ALL:
        if case in skip:
            continue
        if isinstance(case, ModelCase):
            for metric in ("time", "graph_time"):
                for name, seconds in (("dense", 1.0), ("deferred", 0.85), ("grouped", 1.01)):
                    yield (case, name, "step", metric, seconds)
                yield (case, "masked", "step", metric, 1.1)
                for name, seconds in (("dense", 1.0), ("deferred", 0.95), ("masked", 1.01)):
                    yield (case, f"{name}_compiled", "step", metric, seconds)
                yield (case, "dst_compiled", "step", metric, 1.1)
            for name in ("dense", "deferred", "grouped", "masked"):
                yield (case, name, "step", "memory", 100)
            yield (case, "dst_eager", "step", "time", 60.0 if case == LSTM else 2.5)
            yield (case, "dense", "step", "launches", 100)
            yield (case, "deferred", "step", "launches", 103)
            continue
        if isinstance(case, ListCase):
            for name in ("pack", "post", "sgd", "adamw"):
                yield (case, "auto", name, "bandwidth", 950.0)
            continue
        if case.op == "masked_weight":
            for name in ("forward", "backward"):
                yield (case, "auto", name, "bandwidth", 950.0)
            continue
        if isinstance(case, ConvCase):
            yield from times(case, "grad_weight", fused=0.95, packed=1.0)
            continue
        yield from times(
            case,
            "forward_backward",
            dense=1.0,
            auto=0.9,
            dst_compiled=1.1,
            dst_compiled_forced_prologue=1.05,
            dst_eager=2.5,
        )
        for name in ("forward", "grad_weight"):
            yield from times(case, name, gemm=0.9, fused=0.95)
        yield (case, "auto", "forward_backward", "memory", 100)
        yield (case, "dense", "forward_backward", "memory", 100)
        yield (case, "auto", "forward", "saved", 2 * case.N * case.K)
        for name in ("forward", "forward_backward"):
            yield (case, "auto", name, "host_time", 14e-6)
            yield (case, "dense", name, "host_time", 10e-6)


def _verdicts(path, gpu=None):
    return {
        goal.title: goal.verdict(goal.figure(found))
        for found in choose_devices(read_results(path), gpu)
        for goal in GOALS
        if goal.is_about(found)
    }


def _check(*arguments):
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, result.output


def test_all_met(tmp_path):
    path = write_rows(tmp_path / "results.csv", _good())
    assert set(_verdicts(path).values()) == {MET}
    assert _check(path, "--strict")[0] == 0


@pytest.mark.parametrize(
    ("figure", "goals"),
    [
        (("auto", "forward_backward", "time", 1.09), {"÷ dense, worst", "compiled DST, worst"}),
        (("dst_compiled", "forward_backward", "time", 0.5), {"compiled DST, worst"}),
        (("dst_eager", "forward_backward", "time", 1.7), {"eager DST"}),
        (("auto", "forward_backward", "memory", 101), {"peak memory"}),
        (("auto", "forward", "saved", 3 * FIRST.N * FIRST.K), {"saved for backward"}),
        (("auto", "forward", "host_time", 16e-6), {"host cost of forward ÷"}),
        (("auto", "forward_backward", "host_time", 16e-6), {"host cost of forward+backward"}),
    ],
)
def test_one_bad_case_misses_the_goals_it_belongs_to(tmp_path, figure, goals):
    path = write_rows(tmp_path / "results.csv", [*_good(), (FIRST, *figure)])
    missed = {title for title, verdict in _verdicts(path).items() if verdict == MISSED}
    assert len(missed) == len(goals)
    assert all(any(part in title for title in missed) for part in goals)
    code, output = _check(path)
    assert code == 1 and "missed" in output


@pytest.mark.parametrize(
    ("figure", "goals"),
    [
        ((VGG, "deferred", "time", 1.01), {"feedforward models, eager: deferred ÷ dense"}),
        ((VGG, "deferred", "graph_time", 1.01), {"feedforward models, graph: deferred ÷ dense"}),
        ((VGG, "grouped", "time", 1.06), {"small models, eager: grouped ÷ dense"}),
        ((VGG, "grouped", "graph_time", 1.06), {"small models, graph: grouped ÷ dense"}),
        ((RESNET_50, "grouped", "time", 1.03), {"large models, eager: grouped ÷ dense"}),
        ((RESNET_50, "grouped", "graph_time", 1.03), {"large models, graph: grouped ÷ dense"}),
        (
            (RESNET_50, "masked_compiled", "graph_time", 1.03),
            {"compiled, graph: masked_compiled ÷ dense_compiled"},
        ),
        (
            (VGG, "deferred_compiled", "time", 1.01),
            {"compiled, eager: deferred_compiled ÷ dense_compiled"},
        ),
        ((VGG, "dst_compiled", "graph_time", 0.89), {"CIFAR models: best of"}),
        ((RESNET_50, "dst_compiled", "graph_time", 0.84), {"other models: best of"}),
        (
            (VGG, "dst_eager", "time", 1.6),
            {"vgg-16, eager: grouped ÷ dst_eager", "vgg-16, eager: deferred ÷ dst_eager"},
        ),
        ((RESNET_50, "dst_eager", "time", 1.05), {"resnet-50, eager: grouped ÷ dst_eager"}),
        ((VGG, "masked", "memory", 103), {"peak memory of masked"}),
        ((VGG, "grouped", "memory", 103), {"peak memory of grouped"}),
        ((VGG, "deferred", "memory", 103), {"peak memory of deferred"}),
        ((VGG, "deferred", "launches", 104), {"launches of deferred"}),
        ((LSTM, "masked", "time", 1.6), {"lstm-a, eager: masked ÷ dense", "masked ÷ dst_eager"}),
        ((LSTM, "masked", "graph_time", 1.2), {"lstm-a, graph: masked ÷ dense"}),
        ((LSTM, "deferred", "time", 9.0), set()),  # judged as masked alone
        ((LAYER_1K, "deferred", "graph_time", 0.9), {"1k tokens, graph", "compiled DST"}),
        ((LAYER_1K, "deferred", "time", 1.01), {"eager and graph: deferred ÷ dense"}),
        ((LAYER_1K, "dst_compiled", "graph_time", 1.0), {"1k tokens: deferred ÷ compiled DST"}),
    ],
)
def test_one_bad_model_misses_the_goals_it_belongs_to(tmp_path, figure, goals):
    case, provider, metric, value = figure
    bad = (case, provider, "step", metric, value)
    missed = {
        title
        for title, verdict in _verdicts(
            write_rows(tmp_path / "results.csv", [*_good(), bad])
        ).items()
        if verdict == MISSED
    }
    assert len(missed) == len(goals)
    assert all(any(part in title for title in missed) for part in goals)


def test_fewer_launches_than_dense_are_as_good(tmp_path):
    fewer = [(case, "deferred", "step", "launches", 60) for case in SUITES["model"].cases]
    path = write_rows(tmp_path / "results.csv", [*_good(), *fewer])
    assert set(_verdicts(path).values()) == {MET}


_SLOW_CONVS = [
    (ConvCase(256, 7, 512, 512, 3, "bf16-autocast"), MISSED),
    (ConvCase(256, 56, 256, 64, 1, "bf16-autocast"), MISSED),
    (ConvCase(256, 56, 64, 64, 3, "bf16-autocast"), MET),  # for the planner to avoid
]


@pytest.mark.parametrize(("case", "verdict"), _SLOW_CONVS)
def test_a_fused_gradient_is_held_against_the_librarys_where_it_should_win(tmp_path, case, verdict):
    slower = times(case, "grad_weight", fused=1.01)
    verdicts = _verdicts(write_rows(tmp_path / "results.csv", [*_good(), *slower]))
    assert {title for title, found in verdicts.items() if found != MET} == (
        {"fused dW of 1x1 and small-image convolutions ÷ packed, worst"}
        if verdict == MISSED
        else set()
    )


@pytest.mark.parametrize(("seconds", "verdict"), [(1.2, MET), (1.3, MISSED), (None, NOT_MEASURED)])
def test_a_cpu_is_held_against_its_own_goals(tmp_path, seconds, verdict):
    rows = [*times(LENET_ON_CPU, "step", dense=1.0), *_good()]
    if seconds is not None:
        rows += times(LENET_ON_CPU, "step", deferred=seconds)
    path = write_rows(tmp_path / "results.csv", rows, environment("cpu"))
    assert set(_verdicts(path).values()) == {verdict}
    code, output = _check(path)
    assert code == (verdict == MISSED)
    assert "Goals, cpu" in output and "LeNet-300-100" in output and "cuBLAS" not in output


def test_a_gpu_and_a_cpu_in_one_file(tmp_path):
    path = write_rows(tmp_path / "results.csv", _good())
    write_rows(path, times(LENET_ON_CPU, "step", dense=1.0, deferred=1.3), environment("cpu"))
    assert list(_verdicts(path).values()).count(MISSED) == 1
    assert set(_verdicts(path, "made-up").values()) == {MET}


def test_a_mean_is_missed_by_all_cases_together(tmp_path):
    linear = SUITES["linear"].cases
    slower = [row for case in linear for row in times(case, "forward_backward", auto=1.01)]
    verdicts = _verdicts(write_rows(tmp_path / "results.csv", [*_good(), *slower]))
    assert verdicts["forward+backward ÷ dense, mean"] == MISSED
    assert verdicts["forward+backward ÷ dense, worst"] == MET


_STREAMED = Case("masked_weight", 0, 8192, 8192, "bf16-autocast")
_TF32 = next(case for case in SUITES["linear"].cases if case.dtype == "tf32")


@pytest.mark.parametrize(
    ("figure", "title"),
    [
        ((_STREAMED, "auto", "forward", "bandwidth", 890.0), "pack from 16 M weights"),
        ((_STREAMED, "auto", "backward", "bandwidth", 890.0), "post from 16 M weights"),
        ((_TF32, "fused", "forward", "time", 1.1), "fused forward in tf32"),
        ((RESNET, "auto", "pack", "bandwidth", 890.0), "pack over all weights"),
        ((RESNET, "auto", "post", "bandwidth", 890.0), "post over all weights"),
        ((RESNET, "auto", "sgd", "bandwidth", 890.0), "sgd over all weights"),
        ((RESNET, "auto", "adamw", "bandwidth", 890.0), "adamw over all weights"),
    ],
)
def test_goals_of_at_least(tmp_path, figure, title):
    verdicts = _verdicts(write_rows(tmp_path / "results.csv", [*_good(), figure]))
    (missed,) = (name for name, verdict in verdicts.items() if verdict == MISSED)
    assert missed.startswith(title)


def test_a_missing_case_is_named_and_nothing_is_met_without_it(tmp_path):
    path = write_rows(tmp_path / "results.csv", _good(skip=[FIRST]))
    verdicts = _verdicts(path)
    assert verdicts["forward+backward ÷ dense, mean"] == NOT_MEASURED
    assert verdicts["forward+backward ÷ dense, worst"] == NOT_MEASURED
    assert verdicts["fused dW at 8k tokens, of cuBLAS"] == MET
    code, output = _check(path)
    assert code == 0
    assert "1 of 25 cases missing" in " ".join(output.split())
    assert _check(path, "--strict")[0] == 1


def test_a_bad_case_is_bad_whatever_else_is_missing(tmp_path):
    rows = [*ceilings(), *times(FIRST, "forward_backward", auto=2.0, dense=1.0)]
    verdicts = _verdicts(write_rows(tmp_path / "results.csv", rows))
    assert verdicts["forward+backward ÷ dense, worst"] == MISSED
    assert verdicts["forward+backward ÷ dense, mean"] == NOT_MEASURED


def test_rows_of_a_cpu_count_for_no_goal_of_a_gpu(tmp_path):
    path = write_rows(tmp_path / "results.csv", _good(), environment("cpu"))
    assert set(_verdicts(path).values()) == {NOT_MEASURED}
    assert _check(path)[0] == 0
    assert _check(path, "--strict")[0] == 1


def test_gpus_are_not_mixed(tmp_path):
    path = write_rows(tmp_path / "results.csv", _good(), environment("Big 1"))
    write_rows(path, times(FIRST, "forward_backward", auto=9.0), environment("Small 2"))
    with pytest.raises(UsageError, match="part of the name of one of Big 1, Small 2"):
        choose_devices(read_results(path), None)
    assert set(_verdicts(path, "big").values()) == {MET}
    code, output = _check(path, "--gpu", "huge")
    assert code == 2 and "--gpu is 'huge'" in output


def test_ratios_are_of_one_run_the_newest(tmp_path):
    path = tmp_path / "results.csv"
    for day, seconds in (
        ("01", {"auto": 1.0, "dense": 2.0}),
        ("02", {"auto": 3.0, "dense": 4.0}),
        ("03", {"auto": 9.0}),
    ):
        here = environment(date=f"2000-01-{day}")
        write_rows(path, times(FIRST, "forward", **seconds), here)
    found = Measurements("x", read_results(path))
    assert found.time_ratio(FIRST.name, "forward", "auto", "dense") == 0.75
    assert found.time_ratio(FIRST.name, "forward", "auto", ("dst_compiled", "dense")) == 0.75
    assert found.time_ratio(FIRST.name, "forward", "auto", "dst_compiled") is None
    assert found.newest(FIRST.name, "auto", "forward", "time") == 9.0


def test_the_best_of_several_is_eager_or_a_graph_of_one_run(tmp_path):
    path = write_rows(tmp_path / "results.csv", times(VGG, "step", dense=2.0, grouped=1.0))
    later = times(VGG, "step", dense=4.0, deferred=6.0, grouped=7.0)
    later += [(VGG, "grouped", "step", "graph_time", 3.0)]
    write_rows(path, later, environment(date="2000-01-02"))
    write_rows(path, times(VGG, "step", grouped=0.1), environment(date="2000-01-03"))
    found = Measurements("x", read_results(path))
    assert found.best_ratio(VGG.name, "step", ("deferred", "grouped"), ("dense",)) == 0.75
    assert found.best_ratio(VGG.name, "step", ("deferred",), ("dense",)) == 1.5
    assert found.best_ratio(VGG.name, "step", ("masked",), ("dense",)) is None


def test_graph_time_counts_where_everybody_has_it(tmp_path):
    path = write_rows(
        tmp_path / "results.csv", times(FIRST, "forward", auto=4.0, dense=2.0, gemm=1.0)
    )
    graph = [(FIRST, name, "forward", "graph_time", 1.0) for name in ("auto", "dense")]
    write_rows(path, graph)
    found = Measurements("x", read_results(path))
    assert found.time_ratio(FIRST.name, "forward", "auto", "dense") == 1.0
    assert found.time_ratio(FIRST.name, "forward", "auto", "gemm") == 4.0
    assert found.time_ratio(FIRST.name, "forward", "auto", ("dense", "gemm")) == 4.0


def test_figures_of_a_provider_found_wrong_later_do_not_count(tmp_path):
    path = write_rows(tmp_path / "results.csv", times(FIRST, "forward", auto=1.0, dense=1.0))
    wrong = [(FIRST, "auto", "", "error", "output: error 1")]
    write_rows(path, wrong, environment(date="2000-01-02"))
    found = Measurements("x", read_results(path))
    assert found.newest(FIRST.name, "auto", "forward", "time") is None
    write_rows(path, times(FIRST, "forward", auto=3.0), environment(date="2000-01-03"))
    found = Measurements("x", read_results(path))
    assert found.newest(FIRST.name, "auto", "forward", "time") == 3.0
