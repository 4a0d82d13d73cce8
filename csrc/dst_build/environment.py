"""What the environment asks for and offers: switches, compilers, torch's headers, architectures.

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
# Code for the two that are tested; later GPUs compile the PTX, which 9.0a's would not let them.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"

_GIB = 2**30
_MEMORY_PER_JOB = 2 * _GIB


class BuildError(Exception):
    """Something is missing; the message says what was looked for."""


class SettingError(BuildError):
    """A variable is set to what cannot be; the message names it and what is accepted."""


def switch(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """ "auto", "0" or "1", as the variable of that name says; raises SettingError."""
    value = environ.get(name, "") or "auto"
    if value not in ("auto", "0", "1"):
        raise SettingError(f"{name} must be auto, 0 or 1, but is {value!r}")
    return value


def cxx_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command of a compiler that takes C++20, CXX if that is set; raises BuildError."""
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
    """Path of the CUDA compiler; raises BuildError."""
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
    """The folder of the headers of a torch that is new enough.

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
    """As find_spec("torch"), by this interpreter as it is without PYTHONPATH.

    pip isolates a build with that alone; others with an environment of its own, where this finds
    nothing new.
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
    """(nvcc's options for TORCH_CUDA_ARCH_LIST, what they are in words).

    GPUs that the kernels are not for are left out, since container images list all there are.
    Raises SettingError for what is no version, BuildError where none is left.
    """
    text = environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES
    flags, names = [], []
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SettingError(
                f"TORCH_CUDA_ARCH_LIST must list versions such as 8.0, 9.0a or 9.0+PTX, separated "
                f"by semicolons or spaces, but has {entry!r}"
            )
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCHITECTURE:
            continue
        number = f"{major}{minor}{suffix}"
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
        names += codes
    if not flags:
        oldest = ".".join(map(str, OLDEST_ARCHITECTURE))
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r} names no GPU of {oldest} or higher")
    return flags, " ".join(names)


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """How many compilers may run at a time: MAX_JOBS, else what cores and memory allow."""
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
