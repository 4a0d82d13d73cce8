"""Modules run in children of a process that has imported what they need, but not what they test.

A new Python takes seconds to import torch, Triton and pytest; a fork of one that has them takes
none, and may still get a copy of dst_kernels of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = ("numpy", "pytest", "torch", "torch._dynamo", "triton.language")


class Server:
    """Starts with the first request, and ends with the `with` block around it."""

    def __init__(
        self, environment: Mapping[str, str] | None = None, preload: Sequence[str] = PRELOADED
    ):
        """`environment` is that of all children; pytest's variables are left out of this one's."""
        given = os.environ if environment is None else environment
        self._preload = preload
        self._environment = {k: v for k, v in given.items() if not k.startswith("PYTEST_")}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._process is not None:
            self._process.communicate()  # which closes its input, so that it ends

    def run(
        self,
        module: str,
        *arguments: object,
        folder: Path,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        timeout: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        """As `python -m module arguments` in `folder`; modules are looked for in `path` first.

        `environment` is what changes. Raises TimeoutExpired as subprocess does.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._preload],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "path": [str(each) for each in path],
            "environment": dict(environment or {}),
            "timeout": timeout,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ended with {self._process.wait()}")
        status, output, errors = json.loads(answer)
        command = [module, *request["arguments"]]
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout, output, errors)
        return subprocess.CompletedProcess(command, status, output, errors)


def _serve() -> None:
    del sys.path[0]  # this file's folder
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: dict) -> tuple[int | None, str, str]:
    """(exit status, or minus the signal that ended it, or None for a timeout; both outputs)."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()  # so that its own children can be ended with it
                for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output.fileno()),
                                       (2, errors.fileno())):  # fmt: skip
                    os.dup2(source, target)
                status = _run(request)
            finally:
                os._exit(status)
        status = _wait(child, request["timeout"])
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return status, *texts


def _run(request: dict) -> int:
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [*request["path"], request["folder"]]
    sys.argv = [request["module"], *request["arguments"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()
