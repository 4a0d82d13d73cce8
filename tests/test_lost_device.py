"""A test that faults the GPU takes no other test down with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A GPU that faults once, for all of its process.
PLUGIN = """
import torch

lost = False

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize, torch.cuda.empty_cache = synchronize, lambda: None
torch.cuda.memory_reserved = lambda: 2**31
torch.manual_seed = lambda seed: None
"""
TESTS = """
import a_gpu, pytest

@pytest.mark.parametrize("number", range(6))
def test_something(number):
    if number == 1:
        a_gpu.lost = True
    assert number != 3, "wrong, but no fault"
    assert not a_gpu.lost
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_ends_the_process_that_met_it(tmp_path, workers):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "a_gpu.py").write_text(PLUGIN)
    (tmp_path / "test_something.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "a_gpu", "-c", os.devnull, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    options = ["-n", str(workers)] if workers else []
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    failed = set(re.findall(r"FAILED .*\[(\d)\]", done.stdout))
    if workers:
        assert failed == {"1", "3"} and "4 passed" in done.stdout, done.stdout
    else:
        assert failed == {"1"} and "1 passed" in done.stdout, done.stdout
        assert "the device is lost after this failure" in done.stdout
