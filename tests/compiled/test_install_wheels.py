"""Wheels built here, installed into fresh environments and tried there.

The environments see the torch of this one and nothing else of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.path.join(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH", ""), "bin")
)
HAS_PIP = all(importlib.util.find_spec(name) for name in ("pip", "setuptools"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's libraries"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not HAS_PIP, reason="pip and setuptools are not installed"),
]

# C functions of torch's shim, and what the systems' libraries version.
OF_THE_SHIM = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
OF_THE_SYSTEM = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+")
MAY_BE_NEEDED = re.compile(
    r"lib(torch_cpu|torch_cuda|stdc\+\+|m|c|gcc_s|dl|rt|pthread)\.so.*|ld-.*"
)

TRY_IT = """
import warnings; warnings.simplefilter("error")
import torch, dst_kernels
from dst_kernels import functional as dst
weight, threshold = torch.randn(40, 30), torch.rand(40)
expected = dst.masked_weight(weight, threshold, backend="reference")
for backend in {serving}:
    assert torch.equal(dst.masked_weight(weight, threshold, backend=backend), expected)
layer = dst_kernels.nn.MaskedLinear(30, 40)
layer(torch.randn(5, 30)).sum().backward()
assert layer.threshold.grad.isfinite().all()
for backend in {refused}:
    try:
        dst.masked_weight(weight, threshold, backend=backend)
    except RuntimeError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy, for a build writes into the tree. Its objects serve all wheels of this module."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
    for name in ("csrc", "dst_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def environment(**variables: str) -> dict[str, str]:
    dropped = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and "DST_KERNELS" not in k}
    return kept | variables


def run(*command: object, cwd: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def wheel(sources: Path, **variables: str) -> Path:
    """The wheel that pip builds with these variables."""
    folder = Path(tempfile.mkdtemp(dir=sources))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    run(*pip, "-w", folder, sources, cwd=sources, **variables)
    (built,) = folder.iterdir()
    return built


def installed(wheel: Path, folder: Path) -> Path:
    """The python of a new environment that has the wheel and sees torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(packages) / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index")
    run(*pip, "--no-deps", wheel)
    return python


def tried(python: Path, *, serving: tuple[str, ...], refused: tuple[str, ...]) -> tuple[str, str]:
    """(what is said of the backends that refuse, the package's report of itself)."""
    where = {"cwd": python.parent}  # not where the sources are
    said = run(python, "-c", TRY_IT.format(serving=serving, refused=refused), **where)
    return said, run(python, "-m", "dst_kernels", **where)


def libraries(wheel: Path) -> list[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return sorted(Path(name).name for name in names if Path(name).suffix == ".so")


def check_symbols(wheel: Path, name: str, folder: Path) -> None:
    """Nothing of Python, nothing of torch but its C shim, and nothing given away."""
    library = zipfile.ZipFile(wheel).extract(f"dst_kernels/backends/compiled/{name}", folder)
    symbols = [line.split() for line in run("nm", "-D", library).splitlines()]
    undefined = [words[-1] for words in symbols if words[-2] == "U"]
    for symbol in undefined:
        assert OF_THE_SHIM.fullmatch(symbol) or OF_THE_SYSTEM.fullmatch(symbol), symbol
    defined = [words[-1] for words in symbols if words[-2] not in ("U", "w", "v")]
    assert defined == ["dst_kernels_build"]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))
    assert all(MAY_BE_NEEDED.fullmatch(each) for each in needed), needed
    assert not re.search("RPATH|RUNPATH", run("readelf", "-d", library))


def test_without_compilers_the_wheel_is_pure_python(sources, tmp_path):
    built = wheel(sources, DST_KERNELS_BUILD_CPU="0")
    assert built.name.endswith("-py3-none-any.whl") and not libraries(built)
    python = installed(built, tmp_path / "venv")
    said, report = tried(python, serving=("auto",), refused=("cpu", "cuda"))
    for name in ("cpu", "cuda"):
        assert f"backend='{name}' cannot serve: libdst_kernels_{name}.so was not built" in said
        assert re.search(rf"library {name} +no: libdst_kernels_{name}.so was not built", report)


def without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not os.path.exists(os.path.join(f, "nvcc")))


@pytest.mark.parametrize(
    "variables",
    [{"DST_KERNELS_BUILD_CUDA": "0"}, {"PATH": without_nvcc()}],
    ids=["switched off", "no nvcc"],
)
def test_without_cuda(variables, sources, tmp_path):
    if shutil.which("c++", path=variables.get("PATH")) is None:
        pytest.skip("the C++ compiler is in the same folder as nvcc")
    built = wheel(sources, **variables)
    assert re.search(r"-py3-none-linux_\w+\.whl$", built.name)
    assert libraries(built) == ["libdst_kernels_cpu.so"]
    check_symbols(built, "libdst_kernels_cpu.so", tmp_path)
    python = installed(built, tmp_path / "venv")
    said, report = tried(python, serving=("auto", "cpu"), refused=("cuda",))
    assert "backend='cuda' cannot serve: libdst_kernels_cuda.so was not built" in said
    assert "nvcc (in CUDA_HOME/bin" in said and "Use backend='auto' or 'reference'" in said
    assert re.search(r"library cpu +/.+/libdst_kernels_cpu.so \(.+\)", report)
    assert re.search(r"backend cpu +available", report)


@needs_nvcc
@pytest.mark.timeout(1800)
def test_with_cuda(sources, tmp_path):
    path = os.pathsep.join([os.path.dirname(NVCC), os.environ["PATH"]])
    # For one of the architectures: `test_cuda_compile.py` compiles for all.
    built = wheel(sources, PATH=path, TORCH_CUDA_ARCH_LIST="9.0")
    assert re.search(r"-py3-none-linux_\w+\.whl$", built.name)
    assert libraries(built) == ["libdst_kernels_cpu.so", "libdst_kernels_cuda.so"]
    check_symbols(built, "libdst_kernels_cuda.so", tmp_path)
    python = installed(built, tmp_path / "venv")
    said, report = tried(python, serving=("auto", "cpu"), refused=("cuda",))
    assert "backend='cuda' cannot serve: " in said and "was not built" not in said
    if torch.version.cuda is not None:
        assert "needs tensors on a CUDA device, but these are on cpu" in said
        found = r"\(CUDA \d+\.\d+, sm_90\)"
        assert re.search(rf"library cuda +/.+/libdst_kernels_cuda.so {found}", report)
    # Switched off again: nothing is left over from this build.
    assert libraries(wheel(sources, DST_KERNELS_BUILD_CUDA="0", PATH=path)) == [
        "libdst_kernels_cpu.so"
    ]


def test_a_missing_nvcc_fails_a_build_that_asks_for_cuda(sources):
    with pytest.raises(AssertionError) as error:
        wheel(sources, DST_KERNELS_BUILD_CUDA="1", PATH=without_nvcc())
    assert (
        "dst_kernels: DST_KERNELS_BUILD_CUDA=1, but no CUDA compiler was found (CUDA_HOME is not "
        "set; CUDA_PATH is not set; nvcc is not on the PATH)"
    ) in str(error.value)


def test_a_source_distribution_has_all_that_a_build_needs(sources):
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "sdist", cwd=sources)
    (archive,) = (sources / "sdist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    folders = (sources / "csrc", sources / "dst_kernels")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    expected = {str(path.relative_to(sources)) for path in files}
    assert {name for name in expected if "__pycache__" not in name} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
