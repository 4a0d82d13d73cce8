"""A shape and a contender, each added in one place, are measured, reported and judged."""

from __future__ import annotations

import dataclasses
import io

import torch
from rich.console import Console

from bench import contenders, suites
from bench.cases import LinearCase
from bench.contenders import Contender
from bench.contenders.authors import BranchFreeLinear
from bench.contenders.layers import layer
from bench.measure.run import run_suite
from bench.measurements import by_device
from bench.report.goals import MET, Goal, check_goals
from bench.report.tables import write_report
from bench.results import Environment, ResultsFile, read_results

CPU = torch.device("cpu")
SHAPE = LinearCase(7, 20, 30, dtype="fp32")


class Wrong(BranchFreeLinear):
    def forward(self, input):
        return 1.01 * super().forward(input)


def _of_new(found, case):
    return found.time_ratio(case.name, "forward_backward", "new", "dense")


def test_one_of_each_shows_everywhere(tmp_path, monkeypatch):
    added = Contender("new", layer(BranchFreeLinear)), Contender("off", layer(Wrong))
    monkeypatch.setitem(contenders.CONTENDERS, "linear", (*contenders.CONTENDERS["linear"], *added))
    suite = dataclasses.replace(suites.SUITES["linear"], small=(SHAPE,))
    with ResultsFile(tmp_path / "results.csv", Environment.now(CPU, "abc")) as file:
        outcome = run_suite(suite, file, CPU, filters=["/(dense|new|off)$"])
    assert outcome.measured == 3 and outcome.wrong == {SHAPE.name: ["off"]}
    rows = read_results(file.path)
    timed = {(row.case, row.provider) for row in rows if row.metric == "time"}
    assert timed >= {(SHAPE.name, "dense"), (SHAPE.name, "new")}
    assert (SHAPE.name, "off") not in timed

    report = write_report(rows, tmp_path)[0].read_text()
    assert "new ÷ dense" in report and "off ÷ dense" not in report
    assert "| 7 | 20 | 30 | fp32 |" in report and "**off**: output: error" in report

    goal = Goal("linear, mine", (SHAPE,), "new ÷ dense", _of_new, 1000.0, on_cpu=True)
    monkeypatch.setattr("bench.report.goals.GOALS", (goal,))
    (found,) = by_device(rows).values()
    assert check_goals(found, Console(file=io.StringIO())) == {goal.title: MET}
