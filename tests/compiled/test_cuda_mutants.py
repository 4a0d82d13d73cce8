"""The tests of the CUDA kernels turn red when a kernel is wrong: mistakes made on purpose."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import forked
import pytest
from cuda_emulation import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# file, what is right, what is wrong, the source that is compiled with that, the tests that must
# notice: a file and an expression for -k
MUTANTS = {
    "a sum does not wait for the other warps": (
        "reduce.cuh",
        "  __syncthreads();\n  T total",
        "  T total",
        "pack.cu",
        ("weights", "pack_is and float32-torch.float32-aligned"),
    ),
    "a new threshold is not waited for": (
        "reduce.cuh",
        "  __syncthreads();\n  return first",
        "  return first",
        "sgd_step.cu",
        ("emulation", "order and reversed"),
    ),
    "all rows share one threshold": (
        "pack.cu",
        "entry.threshold[share.row]",
        "entry.threshold[0]",
        "pack.cu",
        ("weights", "pack_is and float32-torch.float32-aligned"),
    ),
    "the guard fires one weight late": (
        "guard.cuh",
        "kept <= guard.collapsed",
        "kept < guard.collapsed",
        "pack.cu",
        ("weights", "guard"),
    ),
    "the next launch finds the counter as it was left": (
        "arrivals.cuh",
        "      *counter = 0;\n",
        "",
        "pack.cu",
        ("weights", "guard"),
    ),
    "the last block is the last but one": (
        "arrivals.cuh",
        "static_cast<Counter>(blocks - 1)",
        "static_cast<Counter>(blocks - 2)",
        "pack.cu",
        ("weights", "guard"),
    ),
    "a captured launch uses the counters of its stream": (
        "arrivals.cuh",
        "status != cudaStreamCaptureStatusNone",
        "false",
        "pack.cu",
        ("emulation", "counters"),
    ),
    "no more counters are left, and nobody notices": (
        "arrivals.cuh",
        "count > kCounters - given_",
        "false",
        "pack.cu",
        ("emulation", "counters"),
    ),
    "a threshold is reset while another layer reads it": (
        "pack.cu",
        "s.commit && !shared",
        "s.commit",
        "pack.cu",
        ("weights", "share"),
    ),
    "a step happens where infinity was found": (
        "step.cuh",
        "*scales.found_inf == 1.0f",
        "*scales.found_inf == 2.0f",
        "sgd_step.cu",
        ("steps", "infinity"),
    ),
    "sums of pieces are added to the wrong row": (
        "post.cu",
        "entry.partial + row * entry.pieces",
        "entry.partial + row",
        "post.cu",
        ("weights", "post_is and float32-torch.float32-aligned"),
    ),
    "dW is made under the new threshold": (
        "step.cuh",
        "old, old_threshold)",
        "old, threshold)",
        "sgd_step.cu",
        ("steps", "accurate and sgd-torch.float32-torch.float32-aligned"),
    ),
    "the weight is masked before it is rounded": (
        "step.cuh",
        "return to_floats(rounded)",
        "return parameter",
        "sgd_step.cu",
        ("steps", "accurate and sgd-torch.bfloat16-torch.bfloat16-aligned"),
    ),
}


@pytest.fixture(scope="module")
def server():
    with forked.Server() as server:
        yield server


def run_tests(server: forked.Server, csrc: Path, source: str, file: str, expression: str) -> int:
    environment = {"DST_EMULATION_CSRC": str(csrc), "DST_EMULATION_SOURCE": source}
    options = ("-n", 0, "-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", expression)
    options += ("--every-combination",)
    tests = HERE / f"test_cuda_{file}.py"
    result = server.run("pytest", *options, tests, folder=ROOT, environment=environment)
    return result.returncode


def copied(folder: Path) -> Path:
    shutil.copytree(build.CSRC, folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "csrc"


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mistake_is_noticed(name, server, tmp_path):
    file, right, wrong, compiled, tests = MUTANTS[name]
    csrc = copied(tmp_path)
    path = csrc / "cuda" / file
    source = path.read_text()
    assert right in source, "the mutation must follow the kernel"
    path.write_text(source.replace(right, wrong))
    result = run_tests(server, csrc, compiled, *tests)
    # The emulation may also abort the process, at a barrier that not all threads reach.
    assert result == pytest.ExitCode.TESTS_FAILED or result == -signal.SIGABRT


def test_a_copy_without_a_mistake_passes(server, tmp_path):
    result = run_tests(server, copied(tmp_path), "pack.cu", "weights", "guard")
    assert result == pytest.ExitCode.OK
