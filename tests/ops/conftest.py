"""Hypothesis draws the same examples in every run and keeps no database; whom "auto" means."""

from __future__ import annotations

import pytest
from hypothesis import settings

from dst_kernels._backends import ENVIRONMENT_VARIABLE
from dst_kernels._compiled import library

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
