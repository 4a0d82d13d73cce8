"""The backends that can serve here, as parameters of tests."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dst_kernels.backends.compiled import library

HAS_TRITON = importlib.util.find_spec("triton.language") is not None
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
)
NAME = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = pytest.param(
    NAME, marks=pytest.mark.skipif(library.unavailable(NAME) is not None, reason="not built")
)

BACKENDS = ("reference", COMPILED, TRITON)


def every_backend(*paths):
    """The path and backend arguments: those of `paths` that each backend has."""
    combined = [(path, "reference") for path in paths]
    combined += [pytest.param(path, *TRITON.values, marks=TRITON.marks) for path in paths]
    combined += [
        pytest.param(path, *COMPILED.values, marks=COMPILED.marks)
        for path in paths
        if path in ("packed", "auto")
    ]
    return pytest.mark.parametrize(("path", "backend"), combined)
