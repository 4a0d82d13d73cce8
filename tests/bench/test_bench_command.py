"""`python -m bench` end to end on the CPU, without the providers that compile."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench import gpu, kinds
from bench.baselines import authors_regularization
from bench.commands import app
from bench.environment import ROOT
from bench.gpu import SANITIZER_TESTS, run_part
from bench.kinds import providers_for
from bench.providers import Provider
from bench.results import ResultsFile, read_results
from bench.suites import SUITES

QUICK = ["--suite", "cpu", "--device", "cpu", "--provider", "dense", "--provider", "auto"]


@pytest.fixture(autouse=True)
def _one_thread_in_other_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _invoke(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def _measured(path):
    return {(row.case, row.provider) for row in read_results(path) if row.metric == "time"}


@pytest.mark.slow
def test_run_report_check(tmp_path):
    more = ["--provider", "packed", "--provider", "dst_eager", "--commit", "abc"]
    code, output = _invoke("run", *QUICK, *more, "--out", tmp_path)
    assert code == 0, output
    rows = read_results(tmp_path / "results.csv")
    assert {row.gpu for row in rows} == {"cpu"}
    assert {row.commit for row in rows} == {"abc"}
    assert not [row for row in rows if row.metric in ("error", "skipped")]
    layers = [case for case in SUITES["cpu"].cases if case.op in ("linear", "conv")]
    for case in layers:
        for provider in ("dense", "auto", "packed", "dst_eager"):
            assert (case.name, provider) in _measured(tmp_path / "results.csv")
    assert ("copy", "ceiling") in _measured(tmp_path / "results.csv")
    code, output = _invoke("report", tmp_path / "results.csv")
    assert code == 0, output
    assert "auto ÷ dense" in (tmp_path / "report.md").read_text()
    assert _invoke("check", tmp_path / "results.csv")[0] == 0


def test_a_second_run_measures_what_is_missing(tmp_path):
    path = tmp_path / "results.csv"
    first = ["run", *QUICK[:6], "--out", tmp_path, "--commit", "abc"]
    assert "7 measured" in _invoke(*first)[1]
    count = len(read_results(path))
    assert "0 measured" in _invoke(*first)[1]
    assert len(read_results(path)) == count
    assert "3 measured" in _invoke(*first, "--provider", "gemm")[1]  # of linear cases only
    assert "7 measured" in _invoke(*first[:-1], "def")[1]
    assert "7 measured" in _invoke(*first, "--again")[1]
    assert "0 measured" in _invoke(*first[:-1], "def")[1]


def test_changed_code_is_measured_again(tmp_path):
    dirty = ["run", *QUICK[:6], "--out", tmp_path, "--commit", "abc-dirty"]
    for _ in range(2):
        assert "7 measured" in _invoke(*dirty)[1]
    assert "0 measured" in _invoke(*dirty, "--resume")[1]


def test_no_time_says_what_was_left_out(tmp_path):
    code, output = _invoke("run", *QUICK, "--out", tmp_path, "--minutes", "0")
    assert code == 0
    assert "0 measured" in output and "Left out, the time was up" in output
    for case in SUITES["cpu"].cases:
        names = [one.name for one in providers_for(case.op, ["dense", "auto"])]
        assert f"{case.name}: {', '.join(names)}" in output
    assert read_results(tmp_path / "results.csv") == []


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_has(tmp_path):
    path = tmp_path / "results.csv"
    command = [sys.executable, "-m", "bench", "run", *QUICK, "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--commit", "abc"], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if path.exists() and path.read_text().count("\n") > 5:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = read_results(path)
    assert len(before) >= 3
    code, output = _invoke("run", *QUICK, "--out", tmp_path, "--commit", "abc")
    assert code == 0, output
    assert read_results(path)[: len(before)] == before
    cases = {case.name for case in SUITES["cpu"].cases}
    assert {case for case, name in _measured(path) if name == "dense"} == cases


def _doubled(problem):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    N, K = problem.weight.shape
    layer = Doubled(K, N, dtype=problem.weight.dtype)
    layer.threshold = nn.Parameter(problem.threshold.clone())
    return problem.load_(layer)


def test_a_wrong_provider_fails_the_run(tmp_path, monkeypatch):
    linear = kinds.KINDS["linear"]
    doubled = Provider("doubled", _doubled, authors_regularization)
    more = dataclasses.replace(linear, providers=(*linear.providers, doubled))
    monkeypatch.setitem(kinds.KINDS, "linear", more)
    code, output = _invoke("run", *QUICK, "--provider", "doubled", "--out", tmp_path)
    assert code == 1
    assert f"{SUITES['cpu'].cases[0].name}: doubled" in output.split("WRONG")[1]
    rows = [row for row in read_results(tmp_path / "results.csv") if row.provider == "doubled"]
    assert {row.metric for row in rows} == {"error"}
    assert all("output: error" in row.value for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suite", "models"],
            "--suite 'models' is unknown. Accepted: smoke, streaming, steps, model, linear, conv",
        ),
        (["--provider", "cublas"], "--provider 'cublas' is unknown. Accepted: dense, gemm, auto"),
        (["--device", "tpu"], "--device is 'tpu'. Accepted: cuda, cpu"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    code, output = _invoke("run", *QUICK, "--out", tmp_path, *arguments)
    assert code == 2 and message in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["run", *QUICK, "--device", "cuda"], ["gpu"]])
def test_no_cuda_device(tmp_path, command):
    code, output = _invoke(*command, "--out", tmp_path)
    assert code == 2
    assert "torch sees no CUDA device here. Accepted here: --device cpu" in output


def test_another_table_is_not_appended_to(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")
    code, output = _invoke("run", *QUICK, "--out", tmp_path)
    assert code == 2 and "has the header 'epoch,loss'" in output


@pytest.mark.slow
def test_everything_in_one_command(tmp_path):
    """Half a minute is enough for all but the compiled providers; the tests are run below."""
    command = ["gpu", "--device", "cpu", "--skip-tests", "--minutes", "0.5", "--out", tmp_path]
    code, output = _invoke(*command)
    assert code == 0, output
    names = {path.name for path in tmp_path.iterdir()}
    assert {"environment.txt", "results.csv", "report.md", "log.txt"} <= names
    assert "backend reference" in (tmp_path / "environment.txt").read_text()
    assert len(_measured(tmp_path / "results.csv")) > 10


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,loss\n")
    command = ["gpu", "--device", "cpu", "--skip-tests", "--minutes", "0.5", "--out", tmp_path]
    code, output = _invoke(*command, "--sanitizer")
    assert code == 1
    assert "suite cpu: exit code 2" in output
    assert "report: " in output and "has the header 'epoch,loss'" in output
    assert "compute-sanitizer is not on the PATH" in output or "sanitizer, memcheck" in output
    assert (tmp_path / "environment.txt").exists()


def test_a_suite_that_comes_again_goes_on(tmp_path, monkeypatch):
    """On a GPU what compiles comes last."""
    begun = []
    monkeypatch.setattr(gpu, "run_part", lambda command, log, *_, **__: log.touch())
    monkeypatch.setattr(gpu, "_suite", lambda arguments, *_: begun.append(arguments))
    gpu.run_everything(tmp_path, torch.device("cuda"), 30.0, tests=False)
    assert {name for name, *_ in begun} == set(SUITES) - {"cpu"}
    assert begun[0] == ["smoke"]
    for position, (name, *options) in enumerate(begun):
        again = name in [earlier for earlier, *_ in begun[:position]]
        assert ("--resume" in options) == again
        assert SUITES[name].compiled == 0 or ("--no-compiled" in options) == (not again)


def test_a_part_reports_how_it_ended(tmp_path):
    log = tmp_path / "log.txt"
    assert run_part([sys.executable, "-c", "print('fine')"], log, 60) is None
    assert run_part([sys.executable, "-c", "raise SystemExit(7)"], log, 60) == "exit code 7"
    assert "fine" in log.read_text()


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    log = tmp_path / "log.txt"
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    begin = time.monotonic()
    problem = run_part([sys.executable, "-c", parent], log, 3)
    assert problem == "not finished after 3 s"
    assert time.monotonic() - begin < 20
    pid = int(log.read_text().split("\n")[1])
    time.sleep(0.2)
    assert not _running(pid)


@pytest.mark.slow
def test_tests_that_take_too_long_say_what_has_failed_so_far(tmp_path, monkeypatch):
    tests = tmp_path / "test_slow.py"
    tests.write_text(
        "import time\ndef test_wrong(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "_LAST_WORDS", 10.0)
    problem = gpu._pytest([str(tests), "-c", os.devnull], tmp_path, 16.0)
    assert problem == "not finished after 16 s"
    assert "FAILED" in (tmp_path / "tests.txt").read_text()


def test_the_sanitizer_runs_tests_that_are_there():
    files = {word for word in SANITIZER_TESTS.split() if "::" in word}
    for file, _, test in (word.partition("::") for word in files):
        assert f"def {test}(" in (ROOT / file).read_text()


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody waited for has ended as well
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_results_file_may_be_empty(tmp_path):
    (tmp_path / "results.csv").write_text("")
    with ResultsFile(tmp_path / "results.csv"):
        pass
    assert read_results(tmp_path / "results.csv") == []
