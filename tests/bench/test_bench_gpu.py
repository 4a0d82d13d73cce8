"""`python -m bench gpu`: shares hold to the clock, calls go on, answers come always."""

import os
import re
import tarfile
import time

import pytest
import torch

from bench import gpu
from bench.gpu import PARTS, Part
from bench.results import ROOT
from bench.suites import SUITES

SLEEP = "-c 'import time; time.sleep(60)'"
DEAF = "-c 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)'"
QUICK = "-c 'print(1)'"
FINE, WRONG = "def test_fine(): pass", "def test_wrong(): assert 1 == 2"
ENDLESS, FATAL = "def test_endless(): time.sleep(60)", "def test_fatal(): os._exit(7)"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Makes a call; returns whether all is well, verdict, parts' ends and seconds, output."""
    monkeypatch.setattr(gpu, "_LEAST", 0.5)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # or the parts take themselves for one
    out = tmp_path / "out"

    def run(*parts, minutes=0.1, commit="abc", keep_going=False):
        monkeypatch.setitem(PARTS, "cpu", parts)
        fine = gpu.run_everything(out, torch.device("cpu"), minutes, commit, keep_going)
        text, printed = (out / "verdict.md").read_text(), capsys.readouterr().out
        assert text in printed and "## Times" in text and "## The planner's table" in text
        with tarfile.open(out / "results.tar.gz") as packed:
            assert {"verdict.md", "logs/state.json"} <= set(packed.getnames())
        ended = re.findall(r"^\| ([a-z ]+) \| (.+) \|$", text.split("| part |")[1], re.M)
        allowed = re.findall(r"^== (.+): at most (\d+) s", printed, re.M)
        return fine, text, dict(ended), dict(allowed), printed

    return run


def _tests(folder, *tests):
    path = folder / "test_made_up.py"
    path.write_text("import os, time\n" + "\n".join(tests))
    command = gpu._pytest(f"-c {os.devnull} --rootdir={folder} {path}")
    return Part("tests of nothing", 1, 1, command)


def test_shares_hold_to_the_clock(call):
    """What sleeps is interrupted, what ignores that is killed, what is quick leaves time over."""
    parts = Part("sleeps", 1, 1, SLEEP), Part("deaf", 1, 1, DEAF), Part("quick", 1, 1, QUICK)
    begin = time.monotonic()
    fine, _, ended, allowed, _ = call(*parts, minutes=0.08)
    assert fine and time.monotonic() - begin < 4.8
    assert ended == {"sleeps": "cut off", "deaf": "cut off", "quick": "done"}
    assert allowed["sleeps"] == "1" and allowed["quick"] in "12"


def test_a_second_call_goes_on_with_the_time_that_is_left(call):
    quick, *rest = (Part(name, 9, n, QUICK) for n, name in enumerate(("quick", "two", "three"), 1))
    _, _, ended, allowed, _ = call(quick, Part("sleeps", 1, 1, SLEEP), *rest, minutes=0.05)
    assert ended["quick"] == "done" and ended["sleeps"] == "cut off"
    assert allowed["sleeps"] in "23", "the time that was left over"
    _, text, ended, allowed, _ = call(quick, Part("sleeps", 1, 1, QUICK), *rest)
    assert [*allowed] == ["sleeps", "two", "three"] and "call 2" in text
    assert {*ended.values()} == {"done"}
    for commit in ("def", "unknown", "unknown", "abc-dirty", "abc-dirty"):
        _, text, _, allowed, printed = call(quick, commit=commit)
        assert [*allowed] == ["quick"] and "call 1" in text, "it begins anew"
        warning = f"The commit is '{commit}': a second call cannot go on"
        assert (warning in printed) == (commit != "def")


def test_tests_that_fail_or_kill_pytest_end_the_call_with_their_names(call, tmp_path):
    parts = _tests(tmp_path, FINE, WRONG, FATAL), Part("suite", 1, 1, QUICK)
    fine, text, ended, *_ = call(*parts, minutes=0.5)
    assert not fine and text.startswith("# Verdict: WRONG") and "Nothing was measured" in text
    assert "- tests of nothing: exit code 7\n- test_made_up.py::test_wrong\n" in text
    assert "- test_made_up.py::test_fatal\n" in text
    assert "| test_made_up.py | 1 | 1 | 0 | 1 |" in text and ended["suite"] == "not reached"
    fine, _, ended, *_ = call(*parts, minutes=0.5, keep_going=True)
    assert not fine and ended["suite"] == "done"


@pytest.mark.slow
def test_tests_cut_off_say_what_was_not_reached_and_go_on_there(call, tmp_path):
    last = FINE.replace("fine", "last")
    fine, text, *_ = call(_tests(tmp_path, FINE, ENDLESS, last))
    assert fine and text.startswith("# Verdict: nothing wrong so far, not finished: tests of not")
    assert "Not reached:\n\n- test_made_up.py::test_endless\n- test_made_up.py::test_last" in text
    _, text, *_ = call(_tests(tmp_path, FINE, FINE.replace("fine", "endless"), last), minutes=0.5)
    assert text.startswith("# Verdict: all right") and "| 3 | 0 | 0 | 0 |" in text
    assert "2 passed, 1 deselected" in (tmp_path / "out/logs/tests-of-nothing.txt").read_text()


def test_a_fault_of_the_device_does_not_end_the_suite(call, tmp_path):
    """Exit code 3: the suite is begun again, and leaves out what the rows say is wrong."""
    count, script = tmp_path / "count", tmp_path / "script.py"
    again = f"3 * (len(open({str(count)!r}).read()) < 3)"
    script.write_text(f"open({str(count)!r}, 'a').write('x')\nraise SystemExit({again})")
    assert call(Part("suite", 1, 1, str(script)), minutes=0.3)[2] == {"suite": "done"}
    assert count.read_text() == "xxx"


def test_the_table_of_parts_names_what_is_there():
    for parts in PARTS.values():
        assert sum(part.seconds for part in parts if part.call == 1) + gpu._ENDING == 540
        for part in parts:
            files = re.findall(r"tests/\S+", part.command)
            assert part.name.startswith("tests") == bool(files)
            assert all((ROOT / file).is_file() for file in files)
            assert set(re.findall(r"--suite (\w+)", part.command)) <= set(SUITES)
        compiled = [part.name.startswith("compiled") for part in parts if "--suite" in part.command]
        assert compiled == sorted(compiled), "compiling comes last"
