"""Running a suite: what is measured, in which order, and what is not."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console

from bench import contenders
from bench.cases import LinearCase, WeightsCase
from bench.contenders import Contender, contenders_for
from bench.measure import run
from bench.measure.display import Display
from bench.measure.run import already_measured, choose, run_suite
from bench.results import Environment, ResultsFile, UsageError, read_results
from bench.suites import Suite

CPU = torch.device("cpu")
CASES = LinearCase(8, 12, 10, dtype="fp32"), WeightsCase("12x10")
SUITE = Suite("test", CASES, compiled=1)
HERE = Environment("cpu", "2", "3", "abc", "2026-01-01T00:00:00Z")
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
        monkeypatch.setattr(run, "Display", lambda: Display(Console(file=text)))
        with ResultsFile(tmp_path / "results.csv", HERE) as file:
            outcome = run_suite(SUITE, file, CPU, **options)
        some = file.path.read_text().count("\n") > 1
        return outcome, text.getvalue(), read_results(file.path) if some else []

    return function


def test_what_compiles_comes_last_with_what_it_is_compared_with(go, measured):
    outcome, text, rows = go()
    assert measured == EAGER + COMPILED and outcome.measured == len(measured)
    assert f"{CASES[0].name}: gemm, forward 1 s, 1.00 ÷ dense" in text and "s left]" in text
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


def test_what_is_measured_in_part_or_elsewhere_is_measured_again(go, measured):
    _, _, rows = go(compiled=False)
    part = [row for row in rows if (row.provider, row.pass_) != ("auto", "backward")]
    done = already_measured(part, SUITE, "cpu", HERE)
    assert {*EAGER} - done == {(CASES[0].name, "auto")}
    dirty = Environment("cpu", "2", "3", "abc-dirty", HERE.date)
    assert not already_measured(rows, SUITE, "cpu", dirty)


def test_nothing_is_begun_after_the_deadline(go, measured, monkeypatch):
    outcome, _, rows = go(deadline=0.0)
    left_out = [(case, name) for case, names in outcome.left_out.items() for name in names]
    assert not measured and not rows and sorted(left_out) == sorted(EAGER + COMPILED)
    monkeypatch.setitem(run._COMPILATION, "cpu", 100.0)  # there is no time for one
    outcome, _, _ = go(deadline=time.monotonic() + 50)
    assert measured == EAGER
    assert outcome.left_out == {CASES[0].name: [name for _, name in COMPILED]}


def test_filters_are_found_in_case_and_contender(go, measured):
    go(filters=["LINEAR-m8", "/(auto|dense)$"])
    assert measured == [(CASES[0].name, "dense"), (CASES[0].name, "auto")]
    assert choose({"a/b": 1, "a/c": 2}, ["A", "c$"]) == {"a/c": 2}
    with pytest.raises(UsageError, match=r"--filter is '\(': .* Accepted: a regular expression"):
        go(filters=["("])
    with pytest.raises(UsageError, match="--filter 'cublas' is found in none of 12 names"):
        go(filters=["cublas"])


def test_a_case_without_data_says_why(go, measured, monkeypatch):
    def too_big(case, device):
        raise torch.OutOfMemoryError("too big")

    monkeypatch.setattr(run, "Expectation", too_big)
    outcome, _, rows = go(compiled=False)
    assert not measured and outcome.measured == 0
    skipped = [row for row in rows if row.metric == "skipped"]
    assert [(row.case, row.provider) for row in skipped] == EAGER
    assert {row.value for row in skipped} == {"no data: OutOfMemoryError: too big"}
    assert already_measured(skipped, SUITE, "cpu", HERE) == {*EAGER}


def test_a_wrong_contender_is_told_and_the_others_go_on(go, monkeypatch):
    (dense,) = (one for one in contenders.CONTENDERS["linear"] if one.name == "dense")
    wrong = Contender("wrong", dense.make, ("forward",))
    monkeypatch.setitem(contenders.CONTENDERS, "linear", (wrong, dense))
    outcome, text, rows = go(filters=["^linear"], compiled=False)
    assert outcome.wrong == {CASES[0].name: ["wrong"]} and outcome.measured == 2
    assert f"{CASES[0].name}: wrong  wrong: output: error" in text
    assert [row.metric for row in rows if row.provider == "wrong"] == ["error"]


def test_a_lost_device_ends_the_run(go, monkeypatch):
    """Also where the fault shows in a pass, of which nothing but the reason is kept."""

    def fault(device=None):
        raise RuntimeError("unspecified launch failure")

    def measure(contender, expectation, add):
        error = RuntimeError("illegal memory access")
        run.record_failure(add, "forward", error, torch.device("cuda"))

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    monkeypatch.setattr(run, "measure", measure)
    outcome, _, rows = go()
    assert outcome.lost == "RuntimeError: unspecified launch failure"
    assert outcome.wrong == {CASES[0].name: ["dense"]}
    assert (rows[-1].pass_, rows[-1].metric) == ("forward", "error")
    assert "device faulted" in rows[-1].value


def test_on_a_terminal_the_figures_so_far_are_a_table():
    text = io.StringIO()
    with Display(Console(file=text, force_terminal=True, width=100)) as display:
        display.begin(2)
        display.figure("a case", "dense", "forward", 2e-3, "1.00")
        display.advance()
        display.say("a line")
    assert all(shown in text.getvalue() for shown in ("a line", "÷ dense", "2 ms", "1/2"))
