"""A pytest plugin that records each test's outcome and leaves out those that ended well before.

`python -m bench gpu` runs tests with `-p tests.record`. The file that the environment variable
DST_TESTS_RECORD names holds "outcome test" a line, written at once, so that a process that dies or
is killed keeps what it has and shows which test was running.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FILE = "DST_TESTS_RECORD"
_BEFORE = "DST_TESTS_RECORD_BEFORE"  # how many bytes of it are of earlier runs


def outcomes(path: Path, end: int | None = None) -> dict[str, str]:
    """Return the last outcome of every test in the first `end` bytes of the file."""
    text = path.read_bytes()[:end].decode() if path.exists() else ""
    lines = (line.partition(" ") for line in text.splitlines())
    return {test: outcome for outcome, _, test in lines}


def _record(outcome: str, *tests: str) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the process that started the workers writes
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.writelines(f"{outcome} {test}\n" for test in tests)


def pytest_configure(config: pytest.Config) -> None:
    """Fix what earlier runs are, for the workers as well: all must collect the same."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        path = Path(os.environ[FILE])
        os.environ[_BEFORE] = str(path.stat().st_size if path.exists() else 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = outcomes(Path(os.environ[FILE]), int(os.environ[_BEFORE]))
    done = [item for item in items if before.get(item.nodeid) in ("passed", "skipped")]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]


def pytest_collection_finish(session: pytest.Session) -> None:
    _record("collected", *(item.nodeid for item in session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: object, ids: list[str]) -> None:
    known = outcomes(Path(os.environ[FILE]))
    _record("collected", *(test for test in ids if test not in known))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _record("failed", report.nodeid)


def pytest_runtest_logstart(nodeid: str) -> None:
    _record("running", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the call's outcome; a failure in setup or teardown replaces it."""
    if report.failed or report.when == "call" or (report.skipped and report.when == "setup"):
        _record(report.outcome, report.nodeid)
