"""Running a suite: what is measured, in which order, and what is not; the command on the CPU."""

import dataclasses
import io
import json
import re
import time
from unittest.mock import Mock

import pytest
import torch
from made_up_rows import CPU, bench, environment
from rich.console import Console

from bench.cases import LinearCase, WeightsCase
from bench.commands import app
from bench.contenders import CONTENDERS, Contender, contenders_for
from bench.contenders.authors import BranchFreeLinear
from bench.contenders.layers import layer
from bench.measure import run
from bench.measure.display import Display
from bench.measure.run import already_measured, run_suite
from bench.report.goals import Goal
from bench.results import ResultsFile, read_results
from bench.suites import SUITES, Suite

CASES = LinearCase(8, 12, 10, dtype="fp32"), WeightsCase("12x10")
SUITE = Suite("test", CASES)
HERE = environment("cpu")
EAGER = [(case.name, c.name) for case in CASES for c in contenders_for(case, compiled=False)]
COMPILED = [(CASES[0].name, c.name) for c in contenders_for(CASES[0], compiled=True)]


@pytest.fixture
def measured(monkeypatch):
    order = []

    def measure(contender, expectation, add):  # notes it instead; each takes a second
        order.append((expectation.case.name, contender.name))
        for name in contender.passes:
            add(name, "time", 1.0, "s")

    monkeypatch.setattr(run, "measure", measure)
    return order


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run the suite; return the outcome, what was printed and the rows."""

    def function(**options):
        text = io.StringIO()
        terminal = Console(file=text, force_terminal=True, width=100)
        monkeypatch.setattr(run, "Display", lambda: Display(terminal))
        with ResultsFile(tmp_path / "results.csv", HERE) as file:
            outcome = run_suite(SUITE, file, CPU, **options)
        some = file.path.read_text().count("\n") > 1
        return outcome, text.getvalue(), read_results(file.path) if some else []

    return function


def test_what_compiles_comes_last_with_what_it_is_compared_with(go, measured):
    outcome, text, rows = go()
    assert measured == EAGER + COMPILED and outcome.measured == len(measured)
    assert re.search(rf"{CASES[0].name} +gemm +forward +1 s +1.00 ÷ dense\n", text)
    assert f"{len(measured)}/{len(measured)}" in text, "the progress"
    ceilings = {(row.case, row.metric) for row in rows if row.provider == "ceiling"}
    assert ceilings >= {("copy", "bandwidth"), ("gemm", "flops")}
    done = already_measured(rows, SUITE, "cpu", HERE)
    assert done == {*measured}
    measured.clear()
    assert go(done=done)[0].measured == 0
    go(done=done - {COMPILED[0]})
    assert [name for _, name in measured] == ["dense", "auto", COMPILED[0][1]]
    measured.clear()
    go(done=done - {EAGER[3]})
    assert [name for _, name in measured] == ["dense", EAGER[3][1]]
    # What was measured in part or elsewhere is missing.
    part = [row for row in rows if (row.provider, row.pass_) != ("auto", "backward")]
    assert done - already_measured(part, SUITE, "cpu", HERE) == {(CASES[0].name, "auto")}
    measured.clear()
    go(filters=["LINEAR-m8", "/(auto|dense)$"])
    assert measured == [(CASES[0].name, "dense"), (CASES[0].name, "auto")]
    assert not already_measured(rows, SUITE, "cpu", dataclasses.replace(HERE, commit="x-dirty"))


def test_nothing_is_begun_after_the_deadline(go, measured, monkeypatch):
    outcome, _, rows = go(deadline=0.0)
    left_out = [(case, name) for case, names in outcome.left_out.items() for name in names]
    assert not measured and not rows and sorted(left_out) == sorted(EAGER + COMPILED)
    monkeypatch.setitem(run._COMPILATION, "cpu", 100.0)  # there is no time for one
    outcome, _, _ = go(deadline=time.monotonic() + 50)
    assert measured == EAGER
    assert outcome.left_out == {CASES[0].name: [name for _, name in COMPILED]}


def test_a_case_without_data_says_why(go, measured, monkeypatch):
    monkeypatch.setattr(run, "Expectation", Mock(side_effect=torch.OutOfMemoryError("too big")))
    outcome, _, rows = go(compiled=False)
    assert not measured and outcome.measured == 0
    skipped = [row for row in rows if row.metric == "skipped"]
    assert [(row.case, row.provider) for row in skipped] == EAGER
    assert {row.value for row in skipped} == {"no data: OutOfMemoryError: too big"}
    assert already_measured(skipped, SUITE, "cpu", HERE) == {*EAGER}


def test_a_lost_device_ends_the_run(go, monkeypatch):
    """Also where the fault shows in a pass, of which nothing but the reason is kept."""

    def measure(contender, expectation, add):
        run.record_failure(add, "forward", RuntimeError("bad access"), torch.device("cuda"))

    fault = Mock(side_effect=RuntimeError("unspecified launch failure"))
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    monkeypatch.setattr(run, "measure", measure)
    outcome, _, rows = go()
    assert outcome.lost == "RuntimeError: unspecified launch failure"
    assert outcome.wrong == {CASES[0].name: ["dense"]}
    reason = "the device faulted: RuntimeError: bad access"
    assert (rows[-1].pass_, rows[-1].metric, rows[-1].value) == ("forward", "error", reason)


QUICK = "run --suite smoke --device cpu --no-compiled --commit abc --out".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(SUITES, "smoke", Suite("smoke", CASES))


def test_run_report_check(tmp_path):
    path = tmp_path / "results.csv"
    code, output = bench(*QUICK, tmp_path, "--filter", "/(dense|auto)$")
    assert code == 0 and f"4 measured (contender and case), in {path}" in output
    assert re.search(
        rf"^{CASES[0].name} +dense +forward_backward +\S+ µs +1.00 ÷ dense$", output, re.M
    )
    assert f"{tmp_path}/report.md" in output and ".png" in output
    assert {(row.commit, row.metric == "error") for row in read_results(path)} == {("abc", False)}
    assert bench("report", path, "--out", tmp_path / "out")[0] == 0
    assert "auto ÷ dense" in (tmp_path / "out" / "report.md").read_text()
    assert bench("check", path)[0] == 0 and bench("check", path, "--strict")[0] == 1


def test_a_second_run_measures_what_is_missing(tmp_path, capsys):
    first = [*QUICK, tmp_path, "--filter", "/dense$"]
    for more, count in ((), 2), ((), 0), (["--again"], 2), (["--commit", "a-dirty"], 2):
        assert f"{count} measured" in bench(*first, *more)[1]
    code, output = bench(*first, "--commit", "new", "--minutes", "0")
    assert code == 0 and f"Left out, the time was up:\n  {CASES[0].name}: dense" in output
    # JSON is all there is on the output.
    app([*map(str, first), "--again", "--json", "--filter", "linear"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["commit"], found["measured"], found["left_out"]) == ("abc", 1, {})
    keys = ("provider", "pass", "metric", "unit")
    figures = {tuple(map(one.get, keys)): one["value"] for one in found["figures"]}
    assert 0 < figures["dense", "forward", "time", "s"] < 1


def test_bad_input(tmp_path):
    bad = {
        "--suite models": "--suite 'models' is unknown. Did you mean model? Accepted: linear",
        "--filter cublas": "--filter 'cublas' is found in none of 10 names",
        "--filter (": "unterminated subpattern at position 0. Accepted: a regular expression",
        "--device tpu": "--device 'tpu' is unknown. Accepted: auto, cpu, cuda",
    }
    if not torch.cuda.is_available():
        bad["--device cuda"] = "--device 'cuda': torch finds no such device here. Accepted: auto"
    for more, message in bad.items():
        code, output = bench(*QUICK, tmp_path, *more.split())
        assert code == 2 and message in output
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")
    code, output = bench(*QUICK, tmp_path)
    assert code == 2 and "has the header 'epoch,loss'" in output, "it is not appended to"


def test_a_shape_and_a_contender_added_in_one_place_show_everywhere(tmp_path, monkeypatch):
    shape = LinearCase(7, 20, 30, dtype="fp32")
    monkeypatch.setitem(SUITES, "smoke", Suite("smoke", (shape,)))
    added = Contender("new", layer(BranchFreeLinear)), Contender("off", layer(torch.nn.Linear))
    monkeypatch.setitem(CONTENDERS, "linear", (*CONTENDERS["linear"], *added))
    code, output = bench(*QUICK, tmp_path, "--filter", "/(dense|new|off)$")
    assert code == 1 and "3 measured" in output and f"{shape.name}: off  wrong: output: " in output
    assert f"WRONG, so without a time:\n  {shape.name}: off\n" in output
    rows = read_results(tmp_path / "results.csv")
    timed = {row.provider for row in rows if (row.case, row.metric) == (shape.name, "time")}
    assert timed == {"dense", "new"}
    report = (tmp_path / "report.md").read_text()
    assert "new ÷ dense" in report and "off ÷ dense" not in report
    assert "| 7 | 20 | 30 | fp32 |" in report and "**off**: output: error" in report
    of_new = lambda found, case: found.ratio(case.name, "forward", "time", "new", "dense")  # noqa: E731
    goal = Goal("linear, mine", (shape,), "new ÷ dense", of_new, 1000.0, on_cpu=True)
    monkeypatch.setattr("bench.report.goals.GOALS", (goal,))
    code, output = bench("check", tmp_path / "results.csv", "--strict")
    assert code == 0 and f"met {goal.title}" in re.sub(r"[\d.≤ ]+", " ", output)
