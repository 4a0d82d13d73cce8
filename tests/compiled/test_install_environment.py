"""What a build makes of its environment: switches, compilers, architectures, torch's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

from dst_build import backend, commands, environment
from dst_build.environment import BuildError, SettingError

SOURCES = Path(environment.__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
SWITCHES = ("DST_KERNELS_BUILD_CPU", "DST_KERNELS_BUILD_CUDA")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*SWITCHES, "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# -- switches --------------------------------------------------------------------------------------


def test_a_switch_is_auto_unless_set():
    assert environment.switch("DST_KERNELS_BUILD_CPU", {}) == "auto"
    for value, meant in (("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        assert (
            environment.switch("DST_KERNELS_BUILD_CPU", {"DST_KERNELS_BUILD_CPU": value}) == meant
        )


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " 1"])
def test_an_unknown_value_is_an_error_that_names_the_accepted_ones(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=f"{name} must be auto, 0 or 1, but is {value!r}"):
        commands.wanted()


def test_jobs(monkeypatch):
    assert environment.jobs({}) >= 1
    assert environment.jobs({"MAX_JOBS": "7"}) == 7
    for value in ("0", "-1", "many"):
        with pytest.raises(SettingError, match="MAX_JOBS must be a positive integer"):
            environment.jobs({"MAX_JOBS": value})
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_AVPHYS_PAGES": 1}.get)
    assert environment.jobs({}) == 1, "one compiler at a time where memory is short"


# -- compilers -------------------------------------------------------------------------------------


@needs_compiler
def test_the_compiler_that_cxx_names_is_taken_with_its_arguments():
    environ = dict(os.environ) | {"CXX": f"{COMPILER} -pipe"}
    assert environment.cxx_compiler(environ) == [COMPILER, "-pipe"]


def test_a_missing_compiler_is_said_with_what_was_tried(tmp_path):
    with pytest.raises(
        BuildError, match=r"no C\+\+20 compiler was found .*c\+\+ is not on the PATH"
    ):
        environment.cxx_compiler({"PATH": str(tmp_path)})
    with pytest.raises(BuildError, match="no-such-compiler is not on the PATH"):
        environment.cxx_compiler(dict(os.environ) | {"CXX": "no-such-compiler"})


def test_a_compiler_without_cxx20_is_not_taken(tmp_path):
    old = executable(tmp_path / "old-c++", "exit 1")
    with pytest.raises(BuildError, match=r"old-c\+\+ does not compile C\+\+20"):
        environment.cxx_compiler(dict(os.environ) | {"CXX": str(old)})


def test_where_nvcc_is_looked_for(tmp_path):
    home = executable(tmp_path / "home/bin/nvcc", "true")
    other = executable(tmp_path / "other/bin/nvcc", "true")
    on_path = {"PATH": str(other.parent)}
    assert environment.nvcc(on_path) == str(other)
    assert environment.nvcc(on_path | {"CUDA_PATH": str(tmp_path / "home")}) == str(home)
    assert environment.nvcc(on_path | {"CUDA_HOME": str(tmp_path / "home")}) == str(home)
    assert environment.nvcc(on_path | {"CUDA_HOME": str(tmp_path)}) == str(other)
    with pytest.raises(BuildError) as error:
        environment.nvcc({"PATH": "", "CUDA_HOME": str(tmp_path)})
    for said in (
        f"CUDA_HOME={tmp_path} has no bin/nvcc",
        "CUDA_PATH is not set",
        "not on the PATH",
    ):
        assert said in str(error.value)


# -- what is built ---------------------------------------------------------------------------------


def test_without_compilers_nothing_is_built_and_the_reasons_are_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    reasons = commands.wanted()
    assert "no C++20 compiler was found" in reasons["cpu"]
    assert "needs the library for the CPU" in reasons["cuda"]
    assert commands.extensions() == []
    for name in SWITCHES:
        with monkeypatch.context() as patch, pytest.raises(BuildError, match=f"{name}=1, but"):
            patch.setenv(name, "1")
            commands.wanted()


@needs_compiler
def test_cuda_depends_on_its_compiler_not_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(environment, "nvcc", lambda: "/cuda/bin/nvcc")
    assert commands.wanted() == {"cpu": None, "cuda": None}
    names = [extension.name for extension in commands.extensions()]
    assert names == [
        f"dst_kernels.backends.compiled.libdst_kernels_{name}" for name in ("cpu", "cuda")
    ]
    assert all(extension.optional for extension in commands.extensions())
    monkeypatch.setenv("DST_KERNELS_BUILD_CUDA", "0")
    assert commands.wanted() == {"cpu": None, "cuda": "DST_KERNELS_BUILD_CUDA=0"}
    monkeypatch.setenv("DST_KERNELS_BUILD_CPU", "1")
    assert [extension.optional for extension in commands.extensions()] == [False]


# -- architectures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("", "sm_80 sm_90 compute_80"),
        ("9.0a 9.0", "sm_90"),
        ("8.0;9.0a+PTX", "sm_80 sm_90 compute_80"),
        ("8.0 8.6  10.0f", "sm_80 sm_86 sm_100"),
        (" 8.9+PTX, 12.0; ", "sm_89 sm_120 compute_80"),
        ("7.0 7.5 8.0+PTX 8.0", "sm_80 compute_80"),
    ],
)
def test_all_architectures_are_made_from_the_ptx_of_the_oldest(text, codes):
    flags, words = environment.architecture_flags({"TORCH_CUDA_ARCH_LIST": text})
    assert words == codes
    assert flags == [f"-gencode=arch=compute_80,code=[{codes.replace(' ', ',')}]"]


@pytest.mark.parametrize("text", ["Hopper", "8", "8.0;sm_90", "9.0b", "8.0+ptx"])
def test_what_is_no_architecture_is_an_error_even_where_cuda_is_optional(monkeypatch, text):
    expected = "TORCH_CUDA_ARCH_LIST must list versions such as 8.0, 9.0a or"
    with pytest.raises(SettingError, match=expected):
        environment.architecture_flags({"TORCH_CUDA_ARCH_LIST": text})


def test_architectures_that_are_all_too_old_leave_cuda_out(monkeypatch):
    monkeypatch.setattr(environment, "cxx_compiler", lambda: ["c++"])
    monkeypatch.setattr(environment, "nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    assert "names no GPU of 8.0 or higher" in commands.wanted()["cuda"]


# -- torch -----------------------------------------------------------------------------------------


def test_headers_are_found_where_a_build_is_isolated():
    """As pip does it: the environment is hidden behind PYTHONPATH."""
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(SOURCES)!r})\n"
        "import importlib.util; assert importlib.util.find_spec('torch') is None\n"
        "from dst_build import environment; print(environment.torch_headers())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (Path(found.stdout.strip()) / "torch/csrc/stable/library.h").exists()


def test_headers_of_a_torch_that_is_too_old_are_not_taken(tmp_path):
    shim = tmp_path / "torch/csrc/stable/library.h"
    version = tmp_path / "torch/headeronly/version.h"
    for path in (shim, version):
        path.parent.mkdir(parents=True)
        path.touch()
    for minor, new_enough in ((10, False), (11, True), (100, True)):
        version.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
        found = environment._version_of_headers(tmp_path)
        assert (found >= environment.OLDEST_TORCH) == new_enough
    shim.unlink()
    assert environment._version_of_headers(tmp_path) < environment.OLDEST_TORCH


@needs_compiler
def test_torch_is_asked_for_where_headers_are_needed_and_missing(monkeypatch):
    assert backend._torch() == []
    monkeypatch.setattr(environment, "torch_headers", lambda: None)
    assert backend._torch() == ["torch>=2.11"]
    assert commands.extensions() == [], "a build without isolation goes on without"
    for name in SWITCHES:
        monkeypatch.setenv(name, "0")
    assert backend._torch() == []
    monkeypatch.setenv(SWITCHES[0], "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1"):
        backend._torch()
