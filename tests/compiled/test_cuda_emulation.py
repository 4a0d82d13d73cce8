"""The emulation notices what it is there for, and nothing depends on the order of threads."""

from __future__ import annotations

import subprocess

import cuda_cases
import pytest
import torch
from cuda_cases import DTYPES, Memory
from cuda_emulation import build
from cuda_steps import OPS, call_of
from test_cuda_steps import all_segments
from test_cuda_weights import mixed_operands

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
    for dtype in DTYPES:
        weights, thresholds = mixed_operands(dtype)
        count = len(weights)
        guards = [(weight.numel() // 2, 1) for weight in weights]
        masked, effective, kept, _ = cuda_cases.pack(
            library, Memory(library), weights, thresholds, guards, [dtype] * count
        )
        grads = [torch.randn_like(weight) for weight in weights]
        gradients = cuda_cases.post(
            library, Memory(library), grads, weights, thresholds, [(0, 1)] * count
        )
        results += [*masked, *effective, kept, *gradients[0], *gradients[1]]
        slopes = [torch.empty_like(threshold) for threshold in thresholds]
        value = torch.empty(())
        library.ops.regularization(thresholds, value, slopes)
        results += [value, *slopes]
        for rule in OPS.keys() - {"norm"}:
            call = call_of(rule, all_segments(dtype, dtype))
            library.ops.grad_norm(*call.norm())
            getattr(library.ops, OPS[rule])(*call.arguments())
            results.append(call["norm"])
            results += [t for name in ("weights", "thresholds", "masked") for t in call[name]]
    return results


@pytest.mark.parametrize("order", ["reversed", "1", "2"])
def test_nothing_depends_on_the_order_of_threads(order, monkeypatch):
    expected = everything()
    monkeypatch.setenv("DST_EMULATION_ORDER", order)
    for ours, theirs in zip(everything(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
