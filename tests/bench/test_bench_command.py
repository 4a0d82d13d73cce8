"""`python -m bench` end to end on the CPU: run, report, check and what they say of bad input."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bench.cases import LinearCase, WeightsCase
from bench.commands import app
from bench.results import read_results
from bench.suites import SUITES, Suite

CASES = (LinearCase(8, 12, 10, dtype="fp32"), WeightsCase("12x10"))
QUICK = "run --suite smoke --device cpu --no-compiled --commit abc --out".split()  # noqa: SIM905


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "smoke", Suite("smoke", CASES))

    def invoke(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, result.output

    return invoke


def test_run_report_check(bench, tmp_path):
    path = tmp_path / "results.csv"
    code, output = bench(*QUICK, tmp_path, "--filter", "/(dense|auto)$")
    assert code == 0 and f"4 measured (contender and case), in {path}" in output
    assert f"| {CASES[0].name} | dense | forward_backward |" in output
    assert f"{tmp_path}/report.md" in output and ".png" in output
    assert {(row.commit, row.metric == "error") for row in read_results(path)} == {("abc", False)}
    assert bench("report", path, "--out", tmp_path / "out")[0] == 0
    assert "auto ÷ dense" in (tmp_path / "out" / "report.md").read_text()
    assert bench("check", path)[0] == 0 and bench("check", path, "--strict")[0] == 1


def test_a_second_run_measures_what_is_missing(bench, tmp_path):
    first = [*QUICK, tmp_path, "--filter", "/dense$"]
    for more, count in ((), 2), ((), 0), (["--again"], 2), (["--commit", "a-dirty"], 2):
        assert f"{count} measured" in bench(*first, *more)[1]
    code, output = bench(*first, "--commit", "new", "--minutes", "0")
    assert code == 0 and f"Left out, the time was up:\n  {CASES[0].name}: dense" in output


def test_json_is_all_there_is_on_the_output(bench, tmp_path, capsys):
    app([*QUICK, str(tmp_path), "--json", "--filter", "linear.*/dense$"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["commit"], found["measured"], found["left_out"]) == ("abc", 1, {})
    times = [f for f in found["figures"] if (f["pass"], f["metric"]) == ("forward", "time")]
    (time,) = (f for f in times if f["provider"] == "dense")
    assert time["unit"] == "s" and 0 < time["value"] < 1


def test_bad_input(bench, tmp_path):
    bad = {
        "--suite models": "--suite 'models' is unknown. Accepted: linear, model, conv",
        "--filter cublas": "--filter 'cublas' is found in none",
        "--filter (": "Accepted: a regular expression",
        "--device tpu": "--device is 'tpu'. Accepted: cuda, cpu",
    }
    if not torch.cuda.is_available():
        bad["--device cuda"] = "torch sees no CUDA device here. Accepted here: --device cpu"
    for more, message in bad.items():
        code, output = bench(*QUICK, tmp_path, *more.split())
        assert code == 2 and message in output
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")
    code, output = bench(*QUICK, tmp_path)
    assert code == 2 and "has the header 'epoch,loss'" in output, "it is not appended to"
