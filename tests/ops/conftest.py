"""Hypothesis draws the same examples in every run and keeps no database; whom "auto" means; the
planner's tables."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import settings

from dst_kernels.backends import ENVIRONMENT_VARIABLE
from dst_kernels.backends.compiled import library
from dst_kernels.plan import plan_conv, plan_linear
from dst_kernels.plan import table as plan_table

from .plan_tables import GPU

settings.register_profile("dst_kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("dst_kernels")


@pytest.fixture(scope="module", params=["auto", "reference"])
def each_backend(request):
    """With the compiled library as "auto" takes it, then with the reference in its place."""
    if request.param == "reference" and library.unavailable("cpu") is not None:
        pytest.skip("auto is the reference already: the library for the CPU is not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, request.param)
        yield request.param


def forget_costs():
    plan_linear.cache_clear()
    plan_conv.cache_clear()


@pytest.fixture
def fresh_costs():
    """What the planner remembers is of this test alone."""
    forget_costs()
    yield
    forget_costs()


@pytest.fixture
def table(tmp_path, monkeypatch, fresh_costs):
    """Write a table where the package looks for them."""

    def write(cases=(), **others):
        folder = tmp_path / "tables"
        folder.mkdir(exist_ok=True)
        content = {
            **{"gpu": GPU, "torch": "0", "triton": "0", "commit": "0", "date": "0"},
            **{"cases": list(cases), **others},
        }
        (folder / "test.json").write_text(json.dumps(content))
        (folder / "README.md").write_text("not a table")
        monkeypatch.setattr(plan_table.resources, "files", lambda package: tmp_path)
        plan_table._tables.cache_clear()
        forget_costs()

    yield write
    monkeypatch.undo()
    plan_table._tables.cache_clear()


@pytest.fixture
def exact_float32():
    """On a GPU too; pytest's monkeypatch cannot put this setting back."""
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    yield
    settings.fp32_precision = before
