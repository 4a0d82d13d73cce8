"""Everything worth ten minutes of a GPU, each part in a process of its own.

A kernel that faults takes its process down, not the parts after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .environment import ROOT
from .errors import UsageError
from .report import write_report
from .results import read_results

__all__ = ["LOST", "SANITIZER_TESTS", "run_everything", "run_part"]

LOST = 3
"""Exit code of a run that ended because the device faulted."""

# Every kernel, at small sizes: Triton's, in the tiles of real layers too, and the library's.
SANITIZER_TESTS = " ".join(
    (
        "tests/compiled/test_cuda_on_gpu.py::test_an_op_on_another_stream_waits_for_none",
        "tests/triton/test_tiles.py::test_products_in_every_tile_that_is_chosen",
        "tests/triton/test_tiles.py::test_weight_gradients_in_every_tile_that_is_chosen",
        "tests/triton/test_tiles.py::test_pack_and_post",
        "tests/triton/test_conv_ops.py::test_small_and_split_tiles",
        "-m gpu",
    )
)
# Without torch's cache of memory each tensor is an allocation, beyond whose end memcheck sees.
_SANITIZERS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}

# Small things and those of most goals first; what takes long last, which is compiling. One run of
# nine minutes ends somewhere among these; the next of the same commit goes on from there. The
# arguments are those of `bench run`; a suite that is named twice goes on where it was.
_SUITES = {
    "cuda": (
        ("smoke",),
        ("model", "--no-compiled"),
        ("conv", "--no-compiled"),
        ("steps", "--no-compiled"),
        ("streaming", "--no-compiled"),
        ("model",),
        ("steps",),
        ("linear", "--no-compiled"),
        ("conv",),
        ("linear",),
        ("streaming",),
    ),
    "cpu": (("cpu",),),
}
# On a GPU the kernels' own tests carry the mark too; the compile gate needs none of its time.
_TESTS = {
    # Side by side, because nearly all of their time is Triton compiling.
    "cuda": ["tests", "-m", "gpu and not slow", "-n", str(min(16, os.cpu_count() or 1))],
    "cpu": ["tests/triton", "-m", "not slow"],
}
_SHARE_OF_TESTS = 0.35  # of the time left, and as much for the sanitizer; figures need the rest
_REPORT_SECONDS = 15.0
_GRACE = 30.0  # for what a part has begun when its time is up, such as a compilation
_LAST_WORDS = 20.0  # for a part to say what it has found when it is interrupted
_NO_TESTS_COLLECTED = 5
_MOST_FAULTS = 5
_LINES_SHOWN = 15


def run_everything(
    folder: Path,
    device: torch.device,
    seconds: float,
    *,
    commit: str | None = None,
    tests: bool = True,
    sanitizer: Sequence[str] | None = None,
) -> list[str]:
    """Environment, tests, suites by priority and the report, into `folder`; what failed of it.

    Args:
        seconds: for all parts together.
        commit: recorded with the figures; by default git is asked.
        tests: whether to run them before the suites.
        sanitizer: arguments of pytest for what to run under compute-sanitizer as well, or None.

    Writes environment.txt, tests.txt, results.csv, report.md and its plots, log.txt with what the
    suites said, and a text for each tool of the sanitizer.
    """
    deadline = time.monotonic() + seconds - _REPORT_SECONDS
    folder.mkdir(parents=True, exist_ok=True)
    failed = []

    def note(part: str, problem: str | None, log: str = "") -> None:
        print(f"== {part}: {problem or 'done'}", flush=True)
        if problem:
            failed.append(f"{part}: {problem}")
            if log:
                print(_tail(folder / log), flush=True)

    command = [sys.executable, "-m", "dst_kernels"]
    note("environment", run_part(command, folder / "environment.txt", 120.0, fresh=True))
    print((folder / "environment.txt").read_text(encoding="utf-8"), flush=True)
    if tests:
        end = time.monotonic() + _SHARE_OF_TESTS * (deadline - time.monotonic())
        note("tests", _pytest(_TESTS[device.type], folder, end - time.monotonic()), "tests.txt")
    if sanitizer is not None:
        end = time.monotonic() + _SHARE_OF_TESTS * (deadline - time.monotonic())
        for left, tool in zip((2, 1), _SANITIZERS, strict=True):
            share = (end - time.monotonic()) / left
            note(f"sanitizer, {tool}", _sanitizer(tool, sanitizer, folder, share), f"{tool}.txt")
    begun = set()
    for suite, *options in _SUITES[device.type]:
        options += ["--resume"] if suite in begun else []
        begun.add(suite)
        problem = _suite([suite, *options], folder, device, deadline, commit)
        note(" ".join(["suite", suite, *options]), problem, "log.txt")
    note("report", _report(folder))
    return failed


def run_part(command: list[str], log: Path, seconds: float, *, fresh: bool = False) -> str | None:
    """Run a command from the repository's root with its output appended to `log`.

    After `seconds` it is interrupted; it and what it started are ended. Returns what went wrong, or
    None.
    """
    code = _exit_code(command, log, seconds, fresh)
    return None if code == 0 else _reason(code, seconds)


def _exit_code(
    command: list[str],
    log: Path,
    seconds: float,
    fresh: bool = False,
    variables: Mapping[str, str] | None = None,
) -> int | None:
    """None where the time was up. `variables`: of the environment, beside those there are."""
    with open(log, "w" if fresh else "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(variables or {})},
        )
        try:
            return process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_LAST_WORDS)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(code: int | None, seconds: float) -> str:
    return f"not finished after {seconds:.0f} s" if code is None else f"exit code {code}"


def _pytest(arguments: list[str], folder: Path, seconds: float) -> str | None:
    log = folder / "tests.txt"
    if seconds < 1:
        return "no time left"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    command += ["--continue-on-collection-errors", "--tb", "short"]
    code = _exit_code(command, log, seconds - _LAST_WORDS, fresh=True)
    if code == _NO_TESTS_COLLECTED:
        return f"no tests fit {' '.join(arguments)}"
    return None if code == 0 else _reason(code, seconds)


def _suite(
    arguments: Sequence[str],
    folder: Path,
    device: torch.device,
    deadline: float,
    commit: str | None,
) -> str | None:
    """A run of a suite, begun again without what faulted the device; what went wrong, or None."""
    problem = None
    for attempt in range(1 + _MOST_FAULTS):
        left = deadline - time.monotonic()
        if left < 5:
            return problem or "no time left"
        command = [sys.executable, "-m", "bench", "run", "--out", str(folder)]
        command += ["--suite", *arguments]
        command += ["--device", device.type, "--minutes", f"{left / 60:.3f}"]
        command += ["--commit", commit] if commit else []
        command += ["--resume"] if attempt and "--resume" not in arguments else []
        code = _exit_code(command, folder / "log.txt", left + _GRACE)
        if code == 0:
            return problem
        problem = "the device faulted; see log.txt" if code == LOST else _reason(code, left)
        if code != LOST:
            return problem
    return problem


def _sanitizer(tool: str, tests: Sequence[str], folder: Path, seconds: float) -> str | None:
    binary = shutil.which("compute-sanitizer")
    if binary is None:
        return "compute-sanitizer is not on the PATH"
    if seconds < 5:
        return "no time left"
    command = [binary, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    log, variables = folder / f"{tool}.txt", _SANITIZERS[tool]
    code = _exit_code(command, log, seconds - _LAST_WORDS, fresh=True, variables=variables)
    if code == _NO_TESTS_COLLECTED:
        return f"no tests fit {' '.join(tests)}"
    return None if code == 0 else _reason(code, seconds)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"   {line}" for line in lines[-_LINES_SHOWN:])


def _report(folder: Path) -> str | None:
    try:
        write_report(read_results(folder / "results.csv"), folder)
    except (UsageError, OSError) as error:
        return str(error)
    return None
