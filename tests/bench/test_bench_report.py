"""What is made of figures: report, README's and planner's tables, kernels to profile, goals."""

import io
import json
import sys

import pytest
import torch
from made_up_rows import MADE_UP, bench, ceilings, environment, measured, times, write_rows
from rich.console import Console

from bench.cases import ConvCase, LinearCase, ModelCase, WeightsCase
from bench.plan import plan_markdown, write_plan
from bench.profile import _OTHERS, _SHARES, _TIME, bound, targets
from bench.report import goals
from bench.report.tables import BEGIN, END, main_table, refresh_readme, write_report
from bench.results import UsageError, read_results
from bench.suites import SUITES
from dst_kernels.plan import table as plan_lookup

SMALL, LARGE = (LinearCase(M, 1024, 2048) for M in (16, 1024))
VGG, LIST, BOTH = ModelCase("vgg-16", 128), WeightsCase("resnet-50"), "forward_backward"
FIGURES = [
    *ceilings(),
    *times(SMALL, BOTH, dense=1e-5, auto=5e-6, dst_eager=4e-5),
    *times(LARGE, BOTH, dense=1e-3, auto=2e-3, dst_compiled=1e-3, dst_eager=4e-3, brand_new=1e-3),
    (SMALL, "fused", "", "error", "output: error 1"),
    *((case, "dst_compiled", "backward", "skipped", "Error: no") for case in (SMALL, LARGE)),
    *times(LIST, "pack", dense=2e-5, auto=1e-5),
    *times(LIST, "pack", "bandwidth", auto=8e11),
    *times(VGG, "step", dense=4e-3, deferred=2e-3, dst_eager=8e-3),
    *times(VGG, "step", "graph_time", dense=2e-3, grouped=2e-3, deferred=1.9e-3),
    *times(VGG, "step", "memory", dense=2 * 2**30, deferred=2.02 * 2**30),
]
WHERE = "made-up device, torch 2.99, triton 3.99, commit abc, 2000-01-01."
LINES = """\
| 16 | 1024 | 2048 | bf16-autocast | 10 µs | 0.50 | 4.00 | - |
| 1024 | 1024 | 2048 | bf16-autocast | 1 ms | 2.00 | 4.00 | 1.00 |
| geometric mean |  |  |  |  | 1.00 | 4.00 | 1.00 (1 of 2) |"""


def test_the_report_has_every_contender_plot_and_reason(tmp_path):
    path = write_rows(tmp_path / "results.csv", FIGURES)
    write_rows(path, times(SMALL, "forward", dense=1e-6, auto=1e-6), environment("Other"))
    report, *plots = written = write_report(read_results(path), tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir()) and len(plots) == 2
    text = report.read_text()
    assert all(f"]({plot.name})" in text for plot in plots)
    parts = [
        f"## made-up device\n\n{WHERE}\n\nCeilings, measured: a copy 1000 GB/s, ",
        "### Whole training step, eager (wall clock)",
        "| vgg-16 | 128 | bf16-autocast | 2 ms | 0.95 | 1.00 |\n",
        "| vgg-16 | 128 | bf16-autocast | 2048 MiB | 1.01 |",
        "| auto ÷ dense | dst_eager ÷ dense | dst_compiled ÷ dense | brand_new ÷ dense |",
        LINES.splitlines()[1] + " 1.00 |\n",
        "| resnet-50 | bf16-autocast | 20 µs | 0.50 | 0.80 |",
        f"- **fused**: output: error 1 (`{SMALL.name}`)",
        f"- **dst_compiled**: Error: no (`{SMALL.name}` backward, `{LARGE.name}` backward)",
        "## Other\n\nOther, torch",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_main_table_goes_between_the_markers_of_a_readme(tmp_path):
    table = main_table(measured(tmp_path / "results.csv", FIGURES))
    steps = "| vgg-16 | 128 | bf16-autocast | 2 ms | 0.95 | 1.00 | 4.00 |"
    assert WHERE in table and table.index(LINES) < table.index(steps)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    refresh_readme(readme, table)
    assert readme.read_text() == f"# Name\n\n{BEGIN}\n{table}\n{END}\n\nEnd.\n"
    for text in ("no markers", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}"):
        readme.write_text(text)
        with pytest.raises(UsageError, match="Accepted: a file with one <!-- bench:begin -->"):
            refresh_readme(readme, "table")
        assert readme.read_text() == text


CASE, CONV = LinearCase(128, 1024, 2048), ConvCase(256, 56, 256, 512, 1, stride=2, groups=2)
PASSES = ("forward", "grad_input", "grad_weight")


def test_the_planner_reads_the_table(tmp_path, monkeypatch):
    rows = times(CASE, "forward", "graph_time", fused=0.5, packed=0.25)
    for name in PASSES:
        rows += times(CASE, name, fused=1.0, packed=2.0, mixed=9.0)
        rows += times(CONV, name, fused=3.0, packed=2.0)
    rows += times(CASE, "grad_input", "graph_time", fused=0.5)  # of packed there is none
    rows += times(LinearCase(16, 1024, 2048), "forward", fused=1.0, packed=1.0)  # incomplete
    table = write_plan(measured(tmp_path / "results.csv", rows), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == table
    about = {"gpu": MADE_UP, "torch": "2.99", "triton": "3.99", "commit": "abc"}
    assert about.items() <= table.items() and table["date"] == "2000-01-01T00:00:00Z"
    assert (len(table["cases"]), len(table["convs"])) == (1, 1)
    text = plan_markdown(table)
    assert "| M=128 N=1024 K=2048 float32 bfloat16 | 2.00 | 0.50 | 0.50 | fused |" in text
    assert "C=128 kernel=[1, 1] float32 bfloat16 | 1.50 | 1.50 | 1.50 | packed |" in text
    monkeypatch.setattr(plan_lookup, "_tables", lambda: {MADE_UP: table})
    dtypes = torch.bfloat16, torch.float32
    found = plan_lookup.measured_costs(MADE_UP, 128, 1024, 2048, *dtypes)
    assert (found["fused_forward"], found["packed_forward"]) == (0.5, 0.25)
    assert (found["fused_grad_input"], found["packed_grad_input"]) == (1.0, 2.0)
    # Channels are those of one group, the second size of a weight: dst_kernels/autograd/conv.py.
    N, C, *kernel = CONV.shapes[1]
    found = plan_lookup.measured_conv_costs(MADE_UP, CONV.M, N, C, *dtypes, kernel, (2, 2), 2)
    assert found == {f"{p}_{n}": s for n in PASSES for p, s in (("fused", 3.0), ("packed", 2.0))}
    assert table["convs"][0]["C"] == C == 128
    # There is none without times.
    csv, out = tmp_path / "b.csv", tmp_path / "b.json"
    for gpu, why in ("cpu: x", "all rows are of a CPU"), (MADE_UP, "no case with the times"):
        write_rows(csv, times(CASE, "forward", fused=1.0, packed=1.0), environment(gpu))
        code, output = bench("plan", csv, "--out", out)
        assert code == 2 and why in output and not out.exists()


NARROW, WIDE = (LinearCase(M, 4096, 4096) for M in (128, 1024))
TF32, WEIGHTS = LinearCase(4096, 4096, 4096, dtype="tf32"), WeightsCase("4096x4096")
KERNELS = [*ceilings(1e12, 1e14), *times(NARROW, "forward", fused=1e-3, dense=1e-4)]
KERNELS += [*times(WIDE, "forward", fused=9e-4), *times(WEIGHTS, "pack", auto=2e-4)]
KERNELS += times(TF32, "forward", fused=1e-3)
DRAM, TENSOR, L2, SM = _SHARES.values()
WAVES, STALL = _OTHERS["waves"], "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# As ncu prints the raw page: messages, header, units, launches.
PAGE = f"""==PROF== Connected to process 7
"ID","Kernel Name","{_TIME}","{DRAM}","{TENSOR}"
"","","ns","%","%"
"0","fill","3,000","95","0"
"1","pack_kernel<float>","205,000","87.25","n/a"
==PROF== Disconnected
"""
NCU = f"""#!{sys.executable}
import pathlib, sys
assert sys.argv[-5:-3] == ["-m", "bench.profile"], sys.argv
if "{WEIGHTS.name}" in sys.argv:
    sys.exit("no permission")
pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text({PAGE!r})
"""


def test_ours_are_ranked_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    found = measured(tmp_path / "results.csv", KERNELS)
    first, second, third = targets(found)
    kernels = (NARROW, "fused/forward"), (WIDE, "fused/forward"), (WEIGHTS, "auto/pack")
    assert [one.name for one in targets(found)] == [f"{case.name}/{of}" for case, of in kernels]
    bytes_moved = 4096 * 4096 * 4 + 2 * 128 * 4096 * 2  # which takes longer than the FLOPs
    assert first.least == pytest.approx(bytes_moved / 1e12)
    assert second.least == pytest.approx(2 * 1024 * 4096**2 / 1e14)
    (one,) = targets(found, ["tf32.*fused"])
    assert one.name.startswith(TF32.name) and one.least is None, "no ceiling is measured in TF32"
    command = "profile", tmp_path / "results.csv", "--count", 4
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output = bench(*command)
    assert code == 2 and "ncu (Nsight Compute) or a CUDA device" in output
    (tmp_path / "ncu").write_text(NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: MADE_UP)
    (code, output), text = bench(*command), (tmp_path / "profile.md").read_text()
    assert code == 1 and f"{third.name}: exit code 1, see profile-2.txt" in output
    assert "no permission" in (tmp_path / "profile-2.txt").read_text()
    assert text.count("Bound by memory bandwidth (DRAM): 87 % of its peak.") == 2
    assert "| kernel | `pack_kernel<float>` |" in text and "14.45 times" in text
    code, output = bench(*command, "--minutes", 0)
    assert code == 1 and output.count("no time left") == 3


def test_what_bounds_a_kernel():
    for figures, sentence in (
        ({DRAM: 80, TENSOR: 95}, "memory bandwidth (DRAM): 80 %"),
        ({DRAM: 79.9, TENSOR: 80, SM: 85}, "arithmetic (tensor pipe): 80 %"),
        ({L2: 81, SM: 85}, "bandwidth of L2: 81 %"),
        ({WAVES: 0.4, STALL.format("wait"): 1}, "small grid: 40%"),
        ({WAVES: 0.5, STALL.format("wait"): 1, STALL.format("gmma"): 3}, "75% of a warp's time"),
        ({STALL.format("selected"): 1, STALL.format("not_selected"): 5}, "Not known"),
    ):
        assert sentence in bound({name: str(value) for name, value in figures.items()})


FIRST, POINTWISE = SUITES["linear"].cases[0], SUITES["conv"].cases[5]
LSTM, BIG = ModelCase("lstm-a", 100), WeightsCase("8192x8192")
STEP = {"dense": 1.0, "deferred": 0.85, "grouped": 1.01, "masked": 1.1, "dst_compiled": 1.1}
STEP |= {"dense_compiled": 1.0, "deferred_compiled": 0.95, "masked_compiled": 1.01}
HELD = [f"linear: auto ÷ dense, time of forward backward, {held}" for held in ("mean", "worst")]


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


def _check(path, figures, gpu=MADE_UP):
    console = Console(file=io.StringIO(), width=200)
    verdicts = goals.check_goals(measured(path / "results.csv", figures, gpu), console)
    return verdicts, " ".join(console.file.getvalue().split())


MISSES = [
    (FIRST, "auto", BOTH, "time", 1.09, "linear: auto ÷ dense, time of forward backward, worst"),
    (FIRST, "dst_compiled", BOTH, "time", 0.87, "linear: auto ÷ dst compiled, time of forward"),
    (FIRST, "auto", "forward", "saved", 2**26, "linear: saved for backward"),
    (FIRST, "auto", "forward", "host_time", 2e-5, "linear up to 1k tokens: auto ÷ dense, host"),
    (BIG, "auto", "pack", "bandwidth", 890.0, "16 M weights or more: auto pack"),
    (
        POINTWISE,
        "fused",
        "grad_weight",
        "time",
        1.1,
        "1x1 and small-image convolutions: fused ÷ packed",
    ),
    (VGG, "deferred", "step", "time", 1.01, "feedforward models: deferred ÷ dense, eager, worst"),
    (VGG, "grouped", "step", "graph_time", 1.06, "small models: grouped ÷ dense, graph, worst"),
    (VGG, "dst_compiled", "step", "graph_time", 0.89, "CIFAR models: best of masked compiled"),
    (VGG, "deferred", "step", "launches", 104, "feedforward models: launches of deferred"),
    (LSTM, "masked", "step", "graph_time", 1.2, "lstm-a: masked ÷ dense, graph"),
]


def test_all_met_and_one_bad_case_misses_its_goal(tmp_path):
    assert len({goal.title for goal in goals.GOALS}) == len(goals.GOALS)
    verdicts, printed = _check(tmp_path, _good())
    gpus = [goal.title for goal in goals.GOALS if not goal.on_cpu]
    assert {*verdicts.values()} == {goals.MET} and [*verdicts] == gpus
    assert "Goals, made-up device" in printed and "LeNet-300-100" not in printed, "which is a CPU's"
    for index, (*figure, missed) in enumerate(MISSES):
        verdicts, _ = _check(tmp_path / str(index), [*_good(), figure])
        (title,) = (title for title, verdict in verdicts.items() if verdict == goals.MISSED)
        assert title.startswith(missed)


def test_goals_on_means_of_missing_cases_and_of_a_cpu(tmp_path):
    slower = [row for case in SUITES["linear"].cases for row in times(case, BOTH, auto=1.01)]
    verdicts, _ = _check(tmp_path / "mean", [*_good(), *slower])
    assert [*map(verdicts.get, HELD)] == [goals.MISSED, goals.MET]
    verdicts, printed = _check(tmp_path / "one", _good(skip=FIRST))
    assert {*map(verdicts.get, HELD)} == {goals.NOT_MEASURED}
    assert f"1 of 25 cases missing: {FIRST.name}" in printed
    verdicts, _ = _check(tmp_path / "two", times(FIRST, BOTH, auto=2.0, dense=1.0))
    assert [*map(verdicts.get, HELD)] == [goals.NOT_MEASURED, goals.MISSED]
    # A CPU is held against its own.
    lenet = ModelCase("lenet-300-100", 64, dtype="fp32")
    for seconds, verdict in (1.2, goals.MET), (1.3, goals.MISSED):
        rows = [*times(lenet, "step", dense=1.0, deferred=seconds), *_good()]
        verdicts, printed = _check(tmp_path / verdict, rows, "cpu: Made up")
        assert verdicts["LeNet-300-100: deferred ÷ dense, eager"] == verdict
        assert f"{verdict} {seconds:.3f} ≤ 1.25" in printed and len(verdicts) == 11
    # Ours and peers', where the better counts; a cell where a peer is ahead misses the goal.
    good = {"dense": 1.0, "deferred": 0.6, "deferred_packed": 0.6, "deferred_last_dense": 0.6}
    good |= {"fixed_sgd": 2.0, "fixed_deferred": 0.2, "sparselab": 0.5, "sparseprop": 0.25}
    cases = SUITES["sparse-training"].cases
    rows = [row for case in cases for row in times(case, "step", **good)]
    for more, missed in ((), 0), (times(cases[-1], "step", sparseprop=0.19), 1):
        verdicts, _ = _check(tmp_path / f"peers{missed}", [*rows, *more], "cpu: Made up")
        found = [title for title, verdict in verdicts.items() if verdict == goals.MISSED]
        assert (
            found
            == [
                "sparse training: best of fixed sgd, fixed deferred ÷ best of sparselab, "
                "sparseprop, eager, worst"
            ][:missed]
        )
