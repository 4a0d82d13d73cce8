"""Nine minutes of a GPU: is it right, how fast is it, which path should the planner take?

Each part is a process of its own with a share of the time: a kernel that faults takes its process
down, and neither the parts after it nor the three answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from . import results
from .measurements import Measurements, by_device
from .plan import plan_markdown, write_plan
from .report.tables import few, main_table, markdown_table
from .results import Environment, slug

LOST = 3  # exit code of a command that ended because the device faulted


class Part(NamedTuple):
    """A command and its share of the time; its name begins with "tests" where pytest runs."""

    name: str
    seconds: float  # of a call that takes nine minutes
    call: int  # that comes to it first: 2 and 3 for what the first has no time for
    command: str  # what follows `python`; fields in braces are filled in


_WHERE = "--out {out} --device {device} --minutes {minutes} --commit {commit}"


def _run(suite: str, contenders: str = "", compiled: str = "--no-compiled") -> str:
    only = f"--filter '/({contenders})$'" if contenders else ""
    return f"-m bench run --suite {suite} --json {compiled} {only} {_WHERE}"


def _pytest(options: str, *files: str) -> str:
    named = " ".join(f"tests/{file}.py" for file in files)  # never all of tests/
    return f"-m pytest -q -rf --tb=short -p no:cacheprovider -p tests.record {options} {named}"


# Side by side, because nearly all of their time is Triton compiling; handed out one by one, so that
# the first, which are the hammer's, do not wait for each other.
_ON_GPU = f"-n {min(16, os.cpu_count() or 1)} --maxschedchunk 1 -m gpu"
_CUDA = ("compiled/test_cuda_on_gpu", "compiled/test_cuda_weights", "compiled/test_cuda_steps")
_HAMMER, _REPEATS = "triton/test_hammer", "triton/test_repeatability"
_TRITON = (_HAMMER, "triton/test_tiles", "triton/test_on_gpu", "triton/test_special_values")

# The most valuable first; what goes through torch.compile comes after all that does not.
_ENVIRONMENT = Part("environment", 15, 1, "-m dst_kernels")
_SUITES = (
    Part("linear", 120, 1, _run("linear", "dense|gemm|auto|fused|packed")),
    Part("model", 140, 1, _run("model", "dense|deferred|grouped|masked")),
    Part("conv", 60, 1, _run("conv", "dense|fused|packed|auto")),
    Part("rest of model", 100, 2, _run("model")),
    Part("steps", 60, 2, _run("steps")),
    Part("streaming", 60, 2, _run("streaming")),
    Part("compiled linear", 85, 2, _run("linear", compiled="")),
    Part("compiled models", 85, 2, _run("model", compiled="")),
    Part("compiled steps", 85, 2, _run("steps", compiled="")),
)
_PROFILE = "-m bench profile {out}/results.csv --out {out} --count 2 --minutes {minutes}"
PARTS = {
    "cuda": (
        _ENVIRONMENT,
        Part("tests of the CUDA library", 45, 1, _pytest(_ON_GPU, *_CUDA)),
        Part("tests of Triton's kernels", 100, 1, _pytest(_ON_GPU, *_TRITON, _REPEATS)),
        *_SUITES,
        Part("tiles", 300, 3, f"-m bench tune --filter ^linear {_WHERE}"),
        Part("profile", 100, 3, _PROFILE),
        Part("compiled conv", 75, 3, _run("conv", compiled="")),
    ),
    "cpu": (
        _ENVIRONMENT,
        Part("tests of the CPU library", 45, 1, _pytest("-n 2", "compiled/test_cpu_repeatability")),
        Part("tests of Triton's kernels", 100, 1, _pytest("-n 2", _HAMMER, _REPEATS)),
        *_SUITES,
    ),
}

_MINUTES, _ENDING = 9.0, 60.0  # of nine minutes, the seconds for report and archive
_LEAST = 4.0  # seconds under which nothing is begun
_GRACE = 8.0  # for the last words of what is interrupted
_FAULTS = 5  # how often a suite is begun again after what faulted the device
_NOTHING_LEFT = 5  # pytest's exit code where all tests passed before
_MOST_NAMED = 20
DONE, CUT_OFF, NOT_REACHED = "done", "cut off", "not reached"
_AS_IT_SHOULD = (DONE, CUT_OFF, NOT_REACHED, "exit code 1")  # how pytest may end
_OUTCOMES = ("passed", "failed", "skipped", NOT_REACHED)


def run_everything(
    folder: Path | None, device: torch.device, minutes: float, commit: str | None, keep_going: bool
) -> bool:
    """Run what time allows and print and save a verdict and two tables; return whether all is well.

    Another call with the same folder and code goes on where the last one ended. After tests that
    fail no suite is begun, unless `keep_going`. Into `folder`, by default runs/bench-<device>, go
    results.csv, verdict.md, and results.tar.gz of those and all else.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, parts would ignore it, too
    end = time.monotonic() + 60 * minutes
    parts_end = end - _ENDING * minutes / _MINUTES
    here = Environment.now(device, commit)
    call = _Call(folder or Path("runs", f"bench-{slug(here.gpu)}"), device, here)
    turns = {part: max(part.call, call.number) for part in PARTS[device.type]}
    with contextlib.suppress(KeyboardInterrupt):  # the answers come all the same
        for turn in sorted({*turns.values()}):
            pending = [p for p in turns if turns[p] == turn and call.ended.get(p.name) != DONE]
            for index, part in enumerate(pending):
                # What the parts before left over is shared by those to come.
                left = parts_end - time.monotonic()
                share = left * part.seconds / sum(one.seconds for one in pending[index:])
                stopped = not (keep_going or part.name.startswith("tests")) and call.broken()
                call.run(part, 0.0 if stopped else share)
    return call.conclude(end - time.monotonic())


def run_process(
    command: Sequence[str], log: Path, seconds: float, grace: float = 0.0, **variables: str
) -> int | None:
    """Run a command with its output in `log`; return its exit code, None where it was ended.

    It is interrupted `grace` before `seconds` are over; then it and what it started are killed.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        streams = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=results.ROOT, env=environment, **streams)
        try:
            return process.wait(timeout=max(seconds - grace, 0.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Call:
    """One call: what it and earlier ones of the same code found, in `folder`."""

    def __init__(self, folder: Path, device: torch.device, here: Environment) -> None:
        self.folder, self.device, self.here, self.logs = folder, device, here, folder / "logs"
        self.archive = folder / "results.tar.gz"
        if self.archive.exists() and not self.logs.exists():  # it came back from a machine
            with tarfile.open(self.archive) as packed:
                packed.extractall(folder, filter="data")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.outcomes, path = self.logs / "outcomes.txt", self.logs / "state.json"
        code, known = [here.gpu, here.torch, here.triton, here.commit], here.made(here)
        state = json.loads(path.read_text()) if path.exists() else {}
        if not known:
            print(f"The commit is {here.commit!r}: a second call cannot go on; see --commit.")
        if state.get("code") != code or not known:
            state = {"code": code, "calls": 0, "ended": {}}
            self.outcomes.unlink(missing_ok=True)
        self.ended: dict[str, str] = state["ended"]
        self.number = state["calls"] = state["calls"] + 1
        self.keep = lambda: results.write_whole(path, json.dumps(state, indent=1) + "\n")
        self.keep()

    def run(self, part: Part, seconds: float) -> None:
        if seconds < _LEAST:
            self.ended.setdefault(part.name, NOT_REACHED)
            return
        begin = time.monotonic()
        print(f"== {part.name}: at most {seconds:.0f} s ... ", end="", flush=True)
        log = self.logs / f"{slug(part.name)}.txt"
        for _ in range(1 + _FAULTS):
            left = begin + seconds - time.monotonic()
            code = self.run_once(part.command, log, left) if left > _LEAST else None
            if code != LOST:
                break
        if part.name.startswith("tests") and code == _NOTHING_LEFT and self.tests("passed"):
            code = 0
        # A suite says in its last line, which is JSON, whether its time was too short.
        last = log.read_text(errors="replace").rstrip().rpartition("\n")[2]
        left_out = code == 0 and last.startswith('{"') and json.loads(last)["left_out"]
        cut_off = code is None or left_out
        self.ended[part.name] = CUT_OFF if cut_off else f"exit code {code}" if code else DONE
        self.keep()
        print(f"{self.ended[part.name]} after {time.monotonic() - begin:.0f} s", flush=True)

    def run_once(self, command: str, log: Path, seconds: float) -> int | None:
        grace = min(_GRACE, seconds / 6)
        minutes = f"{(seconds - grace) / 60:.4f}"
        out, commit = shlex.quote(str(self.folder.resolve())), shlex.quote(self.here.commit)
        where = {"out": out, "device": self.device.type, "commit": commit, "minutes": minutes}
        variables = {"DST_TESTS_RECORD": str(self.outcomes.resolve())}
        # A part that is killed while it compiles must leave nothing half done to those that follow.
        with tempfile.TemporaryDirectory() as variables["TORCHINDUCTOR_CACHE_DIR"]:
            arguments = [sys.executable, *shlex.split(command.format(**where))]
            return run_process(arguments, log, seconds, grace, **variables)

    def tests(self, *ended: str) -> dict[str, str]:
        """Return tests with their last outcome, as the plugin tests.record notes it."""
        text = self.outcomes.read_text() if self.outcomes.exists() else ""
        last = {test: how for how, _, test in (line.partition(" ") for line in text.splitlines())}
        return {test: how for test, how in last.items() if how in ended or not ended}

    def broken(self) -> list[str]:
        """Return how pytest died, if it did; and the tests that failed, or were running then."""
        died = [f"{name}: {how}" for name, how in self.ended.items() if name.startswith("tests")]
        died = [text for text in died if not text.endswith(_AS_IT_SHOULD)]
        return [*died, *self.tests("failed", *["running"] * bool(died))]

    def conclude(self, seconds: float) -> bool:
        """Print and save what is known, and pack it all; return whether nothing is wrong."""
        here, rows, found = self.here, [], None
        with contextlib.suppress(results.UsageError):  # where nothing was measured
            rows = results.read_results(self.folder / "results.csv")
            rows = [row for row in rows if here.made(row) or row.date >= here.date]
            found = by_device(rows).get(here.gpu)
        if found:
            command = "-m bench report {out}/results.csv --out {out}/report"
            self.run_once(command, self.logs / "report.txt", max(seconds - 5, _LEAST))

        def answer(make: Callable[[Measurements], str]) -> str:
            try:
                return make(found) if found else "Nothing was measured."
            except Exception as error:  # which may not cost the other answers
                return f"None: {results.first_line(error)}"

        wrong = [
            f"{row.case}/{row.provider}: {row.value}" for row in rows if row.metric == results.ERROR
        ]
        wrong = self.broken() + wrong
        unfinished = [
            name for name, how in self.ended.items() if name.startswith("tests") and how != DONE
        ]
        title = f"nothing wrong so far, not finished: {', '.join(unfinished)}"
        title = "WRONG" if wrong else title if unfinished else "all right"
        versions = f"torch {here.torch}, triton {here.triton}, commit {here.commit}"
        parts = [f"# Verdict: {title}", f"{here.gpu}, {versions}, call {self.number}."]
        for what, names in ("Wrong", wrong), ("Not reached", self.tests("collected", "running")):
            parts += [f"{what}:\n\n- " + few(names, _MOST_NAMED, "\n- ")] if names else []
        counts: dict[str, Counter] = defaultdict(Counter)
        for test, how in self.tests().items():
            counts[test.partition("::")[0]][how if how in _OUTCOMES else NOT_REACHED] += 1
        lines = [[file, *(str(count[how]) for how in _OUTCOMES)] for file, count in counts.items()]
        plan, log = self.folder / f"{slug(here.gpu)}.json", self.logs / "environment.txt"
        parts += [
            markdown_table(["tests", *_OUTCOMES], lines),
            markdown_table(["part", "ended"], self.ended.items()),
            f"## Times\n\n{answer(main_table)}",
            f"## The planner's table\n\n{answer(lambda f: plan_markdown(write_plan(f, plan)))}",
            f"## Environment\n\n```\n{log.read_text() if log.exists() else ''}```",
        ]
        text = "\n\n".join(parts)
        results.write_whole(self.folder / "verdict.md", text + "\n")
        results.write_whole(self.archive, self.pack)
        print(f"\n{text}\n\n{self.archive}", flush=True)
        return not wrong

    def pack(self, file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as packed:
            for child in sorted(self.folder.glob("[!.]*")):
                if child != self.archive:
                    packed.add(child, child.name)
