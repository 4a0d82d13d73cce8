"""Compiles csrc/cuda for the CPU, against the emulation of CUDA in this folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"

FLAGS = (
    "-std=c++20",
    "-O1",
    "-U_FORTIFY_SOURCE",  # whose longjmp does not leave a stack for another
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-maybe-uninitialized",  # what is loaded under a condition is used under the same
    "-D__CUDA_EMULATION__",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(csrc: Path = CSRC) -> Path:
    """The path of the library, which defines `torch.ops.dst_kernels_emulated`."""
    folder = Path(tempfile.gettempdir()) / f"dst_kernels_emulated_{os.getuid()}"
    library = folder / f"{_fingerprint(csrc)}.so"
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        built = _build(csrc, Path(name))
        os.replace(built, library)  # at once, for others may be building the same
    return library


def _sources(csrc: Path) -> list[Path]:
    cuda = [path for path in sorted((csrc / "cuda").glob("*.cu")) if path.stem != "library"]
    return [*cuda, *sorted(HERE.glob("*.cpp"))]


def _fingerprint(csrc: Path) -> str:
    digest = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    headers = [path for folder in (csrc, csrc / "cuda", HERE) for path in folder.glob("*.*h")]
    for path in [*_sources(csrc), *sorted(headers), csrc / "cpu" / "library.cpp", Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(csrc: Path, folder: Path) -> Path:
    schemas = re.findall(
        r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', (csrc / "cpu" / "library.cpp").read_text()
    )
    (folder / "schemas.inc").write_text(",\n".join(schemas))
    torch_folder = Path(torch.__file__).parent
    # The emulation first, in place of the toolkit's headers.
    paths = [f"-I{path}" for path in (HERE, folder, csrc, torch_folder / "include")]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        included = ["-include", "cuda_runtime.h"]  # as nvcc does
        _run(["-x", "c++", *FLAGS, *paths, *included, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, _sources(csrc)))
    library = folder / "emulated.so"
    # The few functions of PyTorch that the emulation replaces must be found here first.
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    _run(["-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries, "-o", str(library)])
    return library


def _run(arguments: list[str]) -> None:
    result = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(result.args)}\n{result.stderr[:4000]}")
    print(result.stderr, end="")
