"""What all tests share: tiers, pairwise parameters, one thread, reproducible random numbers.

`pytest` runs the tests that are not marked `slow`, within five minutes on two cores; `pytest
--rest` runs the slow ones, and `pytest -m timing -n 0` those that compare times. A test with three
or more parametrized arguments runs as few of their combinations as contain every pair of values
(`--every-combination` runs all).

Without a GPU, Triton's kernels run in its interpreter. With one, tests that take the `device`
fixture run there and are marked `gpu`, so that `pytest -m gpu` runs all that needs one. After a
fault of the device no test in that process could tell right from wrong: it ends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import defaultdict

import pytest
import torch

# Code that torch's compiler made for another CPU, or was killed while it wrote, crashes a process:
# every run has a cache of its own, which its workers share.
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
OWN_CACHE = INDUCTOR not in os.environ
if OWN_CACHE:
    os.environ[INDUCTOR] = tempfile.mkdtemp(prefix="dst_kernels_tests_")

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="run the slow tests, and only those")
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="run all combinations of parametrized arguments, not only every pair",
    )


def pytest_configure(config: pytest.Config) -> None:
    for warning in (
        "Conversion of an array with ndim > 0:DeprecationWarning",  # in Triton 3.6
        "invalid value encountered:RuntimeWarning",  # it computes NaN, as it should
    ):
        module = r"triton\.runtime\.interpreter|numpy\._core\.fromnumeric"
        config.addinivalue_line("filterwarnings", f"ignore:{warning}:{module}")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        elif not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if any("::" in argument for argument in config.args):
        return  # whoever names a test gets it
    left_out = set() if config.option.every_combination else _all_but_pairs(items)
    for item in items:
        if item.get_closest_marker("timing"):
            if "timing" not in config.option.markexpr:
                left_out.add(item)
        elif bool(item.get_closest_marker("slow")) != config.option.rest:
            left_out.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _all_but_pairs(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the combinations that add no pair of values to those before them, greedily chosen."""
    tests = defaultdict(list)
    for item in items:
        if len(getattr(getattr(item, "callspec", None), "params", ())) > 2:
            tests[item.parent.nodeid, item.originalname].append(item)
    left_out: set[pytest.Item] = set()
    for combinations in tests.values():
        pairs = {}
        for item in combinations:  # which share the objects that are their parameters' values
            values = [(name, id(value)) for name, value in item.callspec.params.items()]
            pairs[item] = set(itertools.combinations(values, 2))
        wanted = set().union(*pairs.values())
        while wanted:
            best = max(pairs, key=lambda item: len(pairs[item] & wanted))
            wanted -= pairs.pop(best)
        left_out |= pairs.keys()
    return left_out


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWN_CACHE:
        shutil.rmtree(os.environ[INDUCTOR], ignore_errors=True)
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        other = "pytest" if config.option.rest else "pytest --rest"
        print(f"This was one tier of the tests; `{other}` runs the other one.")


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
