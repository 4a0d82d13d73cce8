"""The tests of the CUDA kernels turn red when a kernel is wrong: mistakes made on purpose."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
]

HERE = Path(__file__).parent

# file, what is right, what is wrong, the tests that must notice: a file and an expression for -k
MUTANTS = {
    "a sum does not wait for the other warps": (
        "reduce.cuh",
        "  __syncthreads();\n  T total",
        "  T total",
        ("weights", "pack_is and float32-torch.float32-aligned"),
    ),
    "a new threshold is not waited for": (
        "reduce.cuh",
        "  __syncthreads();\n  return first",
        "  return first",
        ("emulation", "order and reversed"),
    ),
    "all rows share one threshold": (
        "pack.cu",
        "entry.threshold[share.row]",
        "entry.threshold[0]",
        ("weights", "pack_is and float32-torch.float32-aligned"),
    ),
    "the guard fires one weight late": (
        "guard.cu",
        "kept > entry.collapsed",
        "kept >= entry.collapsed",
        ("weights", "guard"),
    ),
    "the count after a reset begins anywhere": (
        "pack.cu",
        "if (block == 0) *entry.kept = 0;",
        "",
        ("weights", "guard"),
    ),
    "the guard acts where infinity was found": (
        "guard.cu",
        "*found_inf == 1.0f",
        "*found_inf == 2.0f",
        ("steps", "infinity"),
    ),
    "sums of pieces are added to the wrong row": (
        "post.cu",
        "entry.partial + row * entry.pieces",
        "entry.partial + row",
        ("weights", "post_is and float32-torch.float32-aligned"),
    ),
    "dW is made under the new threshold": (
        "step.cuh",
        "old, old_threshold)",
        "old, threshold)",
        ("steps", "accurate and sgd-torch.float32-torch.float32-aligned"),
    ),
    "the weight is masked before it is rounded": (
        "step.cuh",
        "return to_floats(rounded)",
        "return parameter",
        ("steps", "accurate and sgd-torch.bfloat16-torch.bfloat16-aligned"),
    ),
}


def run_tests(csrc: Path, file: str, expression: str) -> int:
    options = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")  # those of the run around this one
    environment = {name: value for name, value in os.environ.items() if name not in options}
    environment["DST_EMULATION_CSRC"] = str(csrc)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    test = HERE / f"test_cuda_{file}.py"
    result = subprocess.run(
        [*command, str(test), "-m", "not gpu", "-k", expression],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return result.returncode


def copied(folder: Path) -> Path:
    shutil.copytree(build.CSRC, folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "csrc"


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mistake_is_noticed(name, tmp_path):
    file, right, wrong, tests = MUTANTS[name]
    csrc = copied(tmp_path)
    path = csrc / "cuda" / file
    source = path.read_text()
    assert right in source, "the mutation must follow the kernel"
    path.write_text(source.replace(right, wrong))
    result = run_tests(csrc, *tests)
    # The emulation may also abort the process, at a barrier that not all threads reach.
    assert result == pytest.ExitCode.TESTS_FAILED or result == -signal.SIGABRT


def test_a_copy_without_a_mistake_passes(tmp_path):
    assert run_tests(copied(tmp_path), "weights", "guard") == pytest.ExitCode.OK
