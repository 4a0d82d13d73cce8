"""Shared by all tests: one thread, as the tensors are tiny, and reproducible random numbers.

Without a GPU, Triton's kernels run in its interpreter. With one, tests that take the `device`
fixture run there and are marked `gpu`, so that `pytest -m gpu` runs all that needs one. After a
fault of the device no test in that process could tell right from wrong: it ends.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # before the kernels are decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run."""
    return torch.device("cuda" if GPU else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    for warning in (
        "Conversion of an array with ndim > 0:DeprecationWarning",  # in Triton 3.6
        "invalid value encountered:RuntimeWarning",  # it computes NaN, as it should
    ):
        module = r"triton\.runtime\.interpreter|numpy\._core\.fromnumeric"
        config.addinivalue_line("filterwarnings", f"ignore:{warning}:{module}")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        elif not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = item.session.testsfailed
    result = yield
    if GPU and item.session.testsfailed > before and _device_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another worker takes its place
        pytest.exit("the device is lost after this failure", returncode=1)
    if GPU and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()  # other processes may run tests on the same device
    return result


def _device_is_lost() -> bool:
    """After a fault, or a capture that failed: torch then takes it for going on."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
