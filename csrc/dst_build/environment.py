"""Find what the environment asks for and offers: switches, compilers, headers, architectures.

Nothing here imports torch or looks at a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "OLDEST_TORCH",
    "BuildError",
    "SettingError",
    "architecture_flags",
    "cxx_compiler",
    "jobs",
    "nvcc",
    "switch",
    "torch_headers",
]

OLDEST_TORCH = (2, 11)
OLDEST_ARCHITECTURE = (8, 0)
# Code for the two that are tested, and PTX, from which drivers make the code of later GPUs.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"

_GIB = 2**30
_MEMORY_PER_JOB = 2 * _GIB


class BuildError(Exception):
    """Say that something is missing, and what was looked for."""


class SettingError(BuildError):
    """Say that a variable is set to what cannot be, and what is accepted."""


def switch(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return "auto", "0" or "1", as the variable of that name says; raise SettingError."""
    value = environ.get(name, "") or "auto"
    if value not in ("auto", "0", "1"):
        raise SettingError(f"{name} must be auto, 0 or 1, but is {value!r}")
    return value


def cxx_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command of a compiler that takes C++20, CXX if that is set; raise BuildError."""
    given = environ.get("CXX")
    candidates = [given] if given else ["c++", "g++", "clang++"]
    tried = []
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            tried.append(f"{candidate} is not on the PATH")
        elif not _takes_cxx20(command, environ):
            tried.append(f"{candidate} does not compile C++20")
        else:
            return command
    raise BuildError(f"no C++20 compiler was found ({'; '.join(tried)}); CXX can name one")


def _takes_cxx20(command: list[str], environ: Mapping[str, str]) -> bool:
    command = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <bit>\n#include <concepts>\n"
    try:
        return not subprocess.run(
            command, input=program.encode(), capture_output=True, env=dict(environ)
        ).returncode
    except OSError:
        return False


def nvcc(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of the CUDA compiler; raise BuildError."""
    looked = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := environ.get(variable):
            found = shutil.which("nvcc", path=os.path.join(folder, "bin"))
            if found:
                return found
            looked.append(f"{variable}={folder} has no bin/nvcc")
        else:
            looked.append(f"{variable} is not set")
    found = shutil.which("nvcc", path=environ.get("PATH"))
    if found:
        return found
    raise BuildError(f"no CUDA compiler was found ({'; '.join(looked)}; nvcc is not on the PATH)")


def torch_headers() -> Path | None:
    """Find the folder of the headers of a torch that is new enough.

    An isolated build does not see the environment that it installs into. Where that has a torch,
    its headers do as well: what is compiled with them depends on neither its version nor its
    place.
    """
    for spec in (importlib.util.find_spec("torch"), _spec_outside_isolation()):
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / "include"
            if _version_of_headers(include) >= OLDEST_TORCH:
                return include
    return None


def _spec_outside_isolation():
    """Ask this interpreter, as it is without PYTHONPATH, for find_spec("torch").

    pip isolates a build with that variable alone. Other installers give the build an environment
    of its own, where this finds nothing new.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print((s and s.origin) or '')"
    answer = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True)
    origin = answer.stdout.strip()
    return importlib.util.spec_from_file_location("torch", origin) if origin else None


def _version_of_headers(include: Path) -> tuple[int, ...]:
    if not (include / "torch/csrc/stable/library.h").exists():
        return ()
    text = (include / "torch/headeronly/version.h").read_text(encoding="utf-8")
    found = re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text)
    return tuple(map(int, found))


def architecture_flags(environ: Mapping[str, str] = os.environ) -> tuple[list[str], str]:
    """Return nvcc's options for TORCH_CUDA_ARCH_LIST and what they are in words.

    The kernels use nothing that is newer than the oldest architecture. They are compiled once, to
    its PTX, and the code of every listed GPU is assembled from that; "+PTX" adds the PTX itself.
    The letter of 9.0a or 10.0f asks for nothing that they have. GPUs that the kernels are not for
    are left out, since container images list all there are.

    It raises SettingError for what is no version, BuildError where none is left.
    """
    text = environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES
    codes, with_ptx = [], False
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise SettingError(
                f"TORCH_CUDA_ARCH_LIST must list versions such as 8.0, 9.0a or 9.0+PTX, separated "
                f"by semicolons or spaces, but has {entry!r}"
            )
        major, minor, ptx = match.groups()
        if (int(major), int(minor)) >= OLDEST_ARCHITECTURE:
            codes.append(f"sm_{major}{minor}")
            with_ptx = with_ptx or ptx is not None
    if not codes:
        oldest = ".".join(map(str, OLDEST_ARCHITECTURE))
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r} names no GPU of {oldest} or higher")
    virtual = "compute_" + "".join(map(str, OLDEST_ARCHITECTURE))
    codes = [*dict.fromkeys(codes), *([virtual] if with_ptx else [])]
    return [f"-gencode=arch={virtual},code=[{','.join(codes)}]"], " ".join(codes)


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Count the compilers that may run at a time: MAX_JOBS, else what cores and memory allow."""
    if given := environ.get("MAX_JOBS"):
        if not given.isdecimal() or int(given) < 1:
            raise SettingError(f"MAX_JOBS must be a positive integer, but is {given!r}")
        return int(given)
    try:
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return os.cpu_count() or 1
    return max(1, min(cores, memory // _MEMORY_PER_JOB))
