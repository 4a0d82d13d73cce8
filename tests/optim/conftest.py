"""Every backend that can serve here."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.backends import ENVIRONMENT_VARIABLE, serving, unavailable


@pytest.fixture(autouse=True)
def _no_other_backend(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    reason = unavailable(request.param, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def best_backend() -> str:
    """For tests of what comes before and after the arithmetic, which is the same for all."""
    (name,) = serving("auto", torch.device("cpu"))
    return name
