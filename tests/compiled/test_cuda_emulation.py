"""The emulation notices what it is there for, and nothing depends on the order of threads."""

from __future__ import annotations

import subprocess

import cuda_cases
import pytest
import torch
from cuda_emulation import build
from cuda_ops import NAMES, prepare, small_segments

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

MISTAKES = {
    "missing barrier": "wrong",
    "divergent barrier": "divergent barrier",
    "barrier after exit": "divergent barrier",
    "divergent warp": "different operations",
    "misaligned": "misaligned access",
}


def run_mistake(name: str) -> str:
    program = build.build_program(build.HERE / "mistakes.cu")
    result = subprocess.run([program, name], capture_output=True, text=True)
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name):
    assert MISTAKES[name] in run_mistake(name)


def test_what_is_right_passes():
    assert run_mistake("right") == ""


def everything() -> list[torch.Tensor]:
    """The results of all ops."""
    library = cuda_cases.emulated()
    torch.manual_seed(0)
    results = []
    for name in NAMES:
        prepared = prepare(library, name, small_segments())
        prepared.run()
        results += prepared.tensors()
    return results


@pytest.fixture(scope="module")
def in_order():
    return everything()


@pytest.mark.parametrize("order", ["reversed", "1", "2"])
def test_nothing_depends_on_the_order_of_threads(order, in_order, monkeypatch):
    monkeypatch.setenv("DST_EMULATION_ORDER", order)
    for ours, theirs in zip(everything(), in_order, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
