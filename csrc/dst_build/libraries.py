"""Compile and link one library.

A library has no Python symbols and uses torch through its stable C shim alone, so that one file
serves every Python and every torch from the oldest supported one on.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .environment import BuildError

__all__ = ["LIBRARIES", "SOURCES", "SUFFIX", "Library", "build"]

SOURCES = Path(__file__).resolve().parent.parent
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
DESCRIPTION = "dst_kernels_build"  # the one symbol that a library shows

_COMMON = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_HOST = ("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
# The same numbers on every processor: no multiplication is fused with an addition unless asked to.
_CPU = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
_CUDA = ("-DUSE_CUDA", "--cudart=static")


@dataclass(frozen=True)
class Library:
    """Name the sources, csrc/`name`, and the libraries of torch that have the shims they call."""

    name: str
    shims: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"libdst_kernels_{self.name}{SUFFIX}"

    @property
    def sources(self) -> list[Path]:
        folder = SOURCES / self.name
        return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".cu"))


LIBRARIES = {
    "cpu": Library("cpu", ("torch_cpu",)),
    "cuda": Library("cuda", ("torch_cpu", "torch_cuda")),
}


@dataclass(frozen=True)
class _Tools:
    """Hold commands that lack their files, and what the library says of how it was built."""

    compile: list[str]
    link: list[str]
    described: str


def build(library: Library, folder: Path) -> Path:
    """Compile what has changed of `library` in `folder`, and link it; raise BuildError."""
    headers = environment.torch_headers()
    if headers is None:
        oldest = ".".join(map(str, environment.OLDEST_TORCH))
        raise BuildError(
            f"the headers of torch {oldest} or later were not found: install torch first, or "
            "build with isolation"
        )
    folder.mkdir(parents=True, exist_ok=True)
    cxx = environment.cxx_compiler()
    tools = _for_cuda(cxx) if library.name == "cuda" else _for_cpu(cxx)
    compile = [*tools.compile, f"-I{SOURCES}", "-isystem", str(headers)]
    description = _write(folder / "description.cpp", _description(tools.described))
    sources = [*_units(library, folder), description]
    objects = [folder / f"{source.name}.o" for source in sources]
    target = folder / library.file
    try:
        options = _linker_options(cxx, library, folder)
        with ThreadPoolExecutor(environment.jobs()) as pool:
            list(pool.map(functools.partial(_compile, compile), sources, objects))
        subprocess.run([*tools.link, *map(str, objects), *options, "-o", str(target)], check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{library.file} could not be built: see the messages above") from error
    return target


def _for_cpu(cxx: list[str]) -> _Tools:
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    # Flags of the environment come first: some name an older standard.
    compile = [*cxx, *shlex.split(os.environ.get("CXXFLAGS", "")), *_COMMON, *_HOST, *_CPU]
    return _Tools(compile, [*cxx, "-shared"], version.partition("\n")[0])


def _for_cuda(cxx: list[str]) -> _Tools:
    nvcc = environment.nvcc()
    flags, architectures = environment.architecture_flags()
    command = [nvcc, "-ccbin", shutil.which(cxx[-1]) or cxx[-1], *flags, *_CUDA]
    compile = [*command, *_COMMON, f"-Xcompiler={','.join(_HOST)}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = version.partition("release ")[2].partition(",")[0]
    return _Tools(compile, [*command, "-shared"], f"CUDA {release}, {architectures}")


def _units(library: Library, folder: Path) -> list[Path]:
    """Return the files to compile: C++ as it is, CUDA in two files that include the sources.

    nvcc reads torch's headers anew for each file, which takes longer than most kernels do. The two
    files, the optimizer steps and all other kernels, take about as long as each other.
    """
    units, steps, others = [], [], []
    for source in library.sources:
        if source.suffix != ".cu":
            units.append(source)
        else:
            (steps if source.stem.endswith("_step") else others).append(f'#include "{source}"\n')
    together = {"steps.cu": steps, "others.cu": others}
    written = [_write(folder / name, "".join(lines)) for name, lines in together.items() if lines]
    return [*written, *units]


def _description(text: str) -> str:
    """Return a source file with what `python -m dst_kernels` says about the library."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return (
        'extern "C" __attribute__((visibility("default"))) const char\n'
        f'    {DESCRIPTION}[] = "{quoted}";\n'
    )


def _write(path: Path, content: str) -> Path:
    """Write a file, unless it has that content, which then need not be compiled again."""
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")
    return path


def _linker_options(cxx: list[str], library: Library, folder: Path) -> list[str]:
    """Name torch's libraries, which will be in the process already, and hide all symbols.

    An empty library of the same name takes the place of each of torch's: those may be of another
    build than the one that the library will meet, or lack CUDA.
    """
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    # Functions that are compiled for several processors would stay visible without it.
    visible = folder / "visible.map"
    visible.write_text(f"{{ global: {DESCRIPTION}; local: *; }};\n", encoding="utf-8")
    arguments = [f"--version-script={visible}", "--no-as-needed"]
    for name in library.shims:
        stub = folder / f"lib{name}.so"
        command = [*cxx, "-shared", f"-Wl,-soname,{stub.name}", "-x", "c++", os.devnull]
        subprocess.run([*command, "-o", str(stub)], check=True)
        arguments.append(str(stub))
    # nvcc would move files that are not the linker's own to the front.
    return [word for argument in arguments for word in ("-Xlinker", argument)]


def _compile(compile: list[str], source: Path, made: Path) -> None:
    """Compile one file, unless `made` came from the same command and files as they are now."""
    command = [*compile, "-MD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)]
    record = Path(f"{made}.command")
    if _is_current(made, record, command):
        return
    record.unlink(missing_ok=True)
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)
    record.write_text(shlex.join(command), encoding="utf-8")


def _is_current(made: Path, record: Path, command: list[str]) -> bool:
    """Compare the command with the last one, and the ages of all files that the compiler read."""
    try:
        if record.read_text(encoding="utf-8") != shlex.join(command):
            return False
        rule = Path(f"{made}.d").read_text(encoding="utf-8").replace("\\\n", " ")
        read = shlex.split(rule.partition(": ")[2])
        return all(os.stat(file).st_mtime <= made.stat().st_mtime for file in read)
    except OSError:
        return False
