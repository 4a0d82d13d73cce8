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
TORCH = Path(torch.__file__).parent

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


def build() -> Path:
    """The path of the library, which defines `torch.ops.dst_kernels_emulated`.

    With DST_EMULATION_SOURCE, that file of csrc/cuda is another folder's, DST_EMULATION_CSRC, as is
    what it includes.
    """
    sources = {path.name: CSRC for path in (CSRC / "cuda").glob("*.cu")}
    if other := os.environ.get("DST_EMULATION_SOURCE"):
        # First, for the linker takes the first definition of what is inline.
        del sources[other]
        sources = {other: Path(os.environ["DST_EMULATION_CSRC"]), **sources}
    files = [(csrc / "cuda" / name, csrc) for name, csrc in sources.items()]
    files += [(HERE / name, CSRC) for name in ("fibers.cpp", "library.cpp")]
    schemas = re.findall(
        r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', (CSRC / "cpu" / "library.cpp").read_text()
    )
    folder = _folder()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda file: _object(*file, schemas), files))
    library = folder / f"{_digest([path.name for path in objects])}.so"
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    # The few functions of PyTorch that the emulation replaces must be found here first.
    _make(library, ["-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries])
    return library


def build_program(source: Path) -> Path:
    """An executable of one file and the emulation alone."""
    files = [source, HERE / "fibers.cpp"]
    program = _folder() / _digest([FLAGS, *(path.read_bytes() for path in [*files, *_headers()])])
    included = ["-include", "cuda_runtime.h", f"-I{HERE}", "-x", "c++"]
    _make(program, [*FLAGS, *included, *map(str, files)])
    return program


def _folder() -> Path:
    """What has been compiled stays there, named by what it was made from."""
    folder = Path(tempfile.gettempdir()) / f"dst_kernels_emulated_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _headers() -> list[Path]:
    return sorted(HERE.glob("*.h"))


def _object(source: Path, csrc: Path, schemas: list[str]) -> Path:
    read = [path.read_bytes() for path in [*_with_includes(source, csrc), *_headers()]]
    target = _folder() / f"{source.stem}_{_digest([torch.__version__, FLAGS, schemas, *read])}.o"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schemas.inc").write_text(",\n".join(schemas))
        # The emulation first, in place of the toolkit's headers, one of which nvcc always includes.
        paths = [f"-I{path}" for path in (HERE, folder, csrc, TORCH / "include")]
        included = ["-include", "cuda_runtime.h"]
        _make(target, ["-x", "c++", *FLAGS, *paths, *included, "-c", str(source)])
    return target


def _with_includes(source: Path, csrc: Path) -> list[Path]:
    """The file, and those of csrc that it comes to include."""
    found: list[Path] = []
    pending = [source]
    while pending:
        path = pending.pop().resolve()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            candidates = (folder / name for folder in (path.parent, csrc))
            pending += [candidate for candidate in candidates if candidate.exists()][:1]
    return sorted(found)


def _digest(parts: list) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _make(target: Path, arguments: list[str]) -> None:
    """Run the compiler, unless the target is there: its name says what it was made from."""
    if target.exists():
        return
    handle, made = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    command = [compiler(), *arguments, "-o", made]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        os.unlink(made)
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")
    os.replace(made, target)  # at once, for others may be making the same
