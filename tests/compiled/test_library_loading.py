"""Loading the libraries: at first use, in order, and with a reason where that cannot be."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels import reference
from dst_kernels.backends import choice
from dst_kernels.backends.compiled import library
from dst_kernels.nn import MaskedLinear

CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(not library.BUILT["cpu"], reason="the CPU library was not built")
needs_cuda = pytest.mark.skipif(not library.BUILT["cuda"], reason="the CUDA library was not built")


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """As in a new process, with the libraries in an empty folder; files that a test names there."""
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_FOLDER", tmp_path)

    def there(**files: bytes):
        for name in ("cpu", "cuda"):
            if name in files:
                library.path(name).write_bytes(files[name])
            monkeypatch.setitem(library.BUILT, name, name in files)
        library.unavailable.cache_clear()
        choice.forget()

    there()
    yield there
    library.unavailable.cache_clear()
    choice.forget()


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_library_that_was_not_built_is_said_with_how_to_build_it(afresh):
    for name, needed in (("cpu", "a C++20 compiler"), ("cuda", "nvcc (in CUDA_HOME/bin")):
        with pytest.raises(RuntimeError) as error:
            MaskedLinear(3, 4, backend=name)
        for said in (
            f"backend='{name}' cannot serve: libdst_kernels_{name}",
            f"there is no {library.path(name)}",
            f"DST_KERNELS_BUILD_{name.upper()}=1 pip install --no-build-isolation -e .",
            needed,
            "Use backend='auto' or 'reference'",
        ):
            assert said in str(error.value)
    assert choice.serving("auto", CPU) == ("reference",)


def test_one_that_cannot_be_loaded_is_warned_of_once_and_auto_goes_on(afresh):
    afresh(cpu=b"no library at all")
    weight, threshold = torch.ones(4, 3), torch.zeros(4)
    with pytest.warns(RuntimeWarning, match=r"libdst_kernels_cpu.* cannot be loaded: .+"):
        assert torch.equal(dst.masked_weight(weight, threshold), weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dst.masked_weight(weight, threshold), weight)
        with pytest.raises(RuntimeError, match=r"backend='cpu' cannot serve: .*cannot be loaded"):
            MaskedLinear(3, 4, backend="cpu")


def test_cuda_needs_a_torch_with_cuda_and_the_library_with_the_schemas(afresh, monkeypatch):
    afresh(cuda=b"")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "needs the library for the CPU, but libdst_kernels_cpu" in library.unavailable("cuda")
    afresh(cuda=b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in library.unavailable("cuda")


def test_an_older_torch_is_refused(afresh, monkeypatch):
    afresh(cpu=b"")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.1+cpu"))
    assert library.unavailable("cpu").endswith("needs torch 2.11 or later, but this is 2.10.1+cpu")


@needs_cpu
def test_each_is_loaded_when_it_is_first_asked_for_and_not_before():
    code = (
        "import torch, dst_kernels.functional as dst\n"
        "def loaded(): return [p.rpartition('_')[2][:4] for p in torch.ops.loaded_libraries"
        " if 'libdst_kernels' in p]\n"
        "print(loaded())\n"
        "layer = dst.masked_weight(torch.ones(4, 3), torch.zeros(4))\n"
        "print(loaded(), torch.cuda.is_initialized())"
    )
    assert python(code).splitlines() == ["[]", "['cpu.'] False"]


@needs_cuda
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_the_cuda_library_loads_without_a_gpu_and_starts_nothing():
    code = (
        "import torch\n"
        "from dst_kernels.backends.compiled import library\n"
        "print(library.unavailable('cuda'), torch.cuda.is_initialized())\n"
        "print(library.describe('cuda'))\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = torch._C._dispatch_get_all_op_names()\n"
        "names = [name for name in names if name.startswith('dst_kernels_compiled::')]\n"
        "names = [name for name in names if 'sparse_' not in name and 'kept_' not in name]\n"
        "print(all(has(name, key) for name in names for key in ('CPU', 'CUDA')), len(names) > 4)"
    )
    state, described, registered = python(code).splitlines()
    assert state == "None False" and registered == "True True"
    assert described.startswith("CUDA ") and "sm_" in described


@needs_cpu
def test_what_a_library_says_of_itself():
    assert library.unavailable("cpu") is None
    assert library.describe("cpu").isprintable() and len(library.describe("cpu")) > 3


@needs_cpu
def test_auto_on_a_cpu_is_the_library(monkeypatch):
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    from dst_kernels.backends.compiled import ops

    assert choice.implementation("auto", CPU, "masked_weight") is ops.masked_weight
    assert set(ops.__all__) <= set(reference.__all__), "the same names as the reference's"
