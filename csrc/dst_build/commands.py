"""Tell setuptools which extensions there are, how they are built, and the wheel's tag."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

from . import environment
from .environment import BuildError, SettingError
from .libraries import LIBRARIES, SOURCES, SUFFIX, build

__all__ = ["COMMANDS", "extensions", "wanted"]

ROOT = SOURCES.parent
PACKAGE = "dst_kernels.backends.compiled"
FOLDER = Path("dst_kernels/backends/compiled")
OBJECTS = ROOT / "build" / "compiled"  # kept between builds, for all Pythons


def wanted() -> dict[str, str | None]:
    """Return why each library is left out, by its name; None where it is to be built.

    It raises BuildError where one that was asked for cannot be built or a variable is wrong.
    """
    environment.jobs()
    reasons: dict[str, str | None] = {}
    for name in LIBRARIES:
        variable = f"DST_KERNELS_BUILD_{name.upper()}"
        choice = environment.switch(variable)
        reason = f"{variable}=0" if choice == "0" else _missing(name, reasons)
        if reason is not None and choice == "1":
            raise BuildError(f"{variable}=1, but {reason}")
        reasons[name] = reason
    return reasons


def _missing(name: str, reasons: dict[str, str | None]) -> str | None:
    if sys.platform not in ("linux", "darwin"):
        return f"it is not built on {sys.platform}"
    if name == "cuda" and reasons["cpu"] is not None:
        return f"it needs the library for the CPU, which is left out: {reasons['cpu']}"
    try:
        if name == "cpu":
            environment.cxx_compiler()
        else:
            environment.nvcc()
            environment.architecture_flags()
    except SettingError:
        raise
    except BuildError as error:
        return str(error)
    return None


def extensions() -> list[Extension]:
    """Return the libraries that can be built here, as setuptools sees them.

    With "auto" a library that does not compile is left out with a warning. Where torch's headers
    are missing none is there; `backend` asks for a torch before it comes to a build.
    """
    found = []
    headers = environment.torch_headers() is not None
    for name, reason in wanted().items():
        automatic = environment.switch(f"DST_KERNELS_BUILD_{name.upper()}") == "auto"
        if reason is None and (headers or not automatic):
            library = LIBRARIES[name]
            extension = Extension(
                f"{PACKAGE}.{library.file.removesuffix(SUFFIX)}",
                [os.path.relpath(source, ROOT) for source in library.sources],
                optional=automatic,
            )
            extension.library = library
            found.append(extension)
    return found


class BuildLibraries(build_ext):
    """Compile as `libraries` says, into files whose names do not have the tag of a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        try:
            made = build(ext.library, OBJECTS / ext.library.name)
        except BuildError as error:
            raise CompileError(str(error)) from error
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(made), target)


class BuildPython(build_py):
    """Say what is left out, and drop libraries that an earlier build left behind."""

    def run(self) -> None:
        for name, reason in wanted().items():
            if reason is not None:
                self.warn(f"{LIBRARIES[name].file} is left out: {reason}")
        folders = [Path(self.build_lib) / FOLDER]
        if self.editable_mode:
            folders.append(ROOT / FOLDER)
        for folder in folders:
            for library in LIBRARIES.values():
                (folder / library.file).unlink(missing_ok=True)
        super().run()

    def get_source_files(self) -> list[str]:
        """Add csrc, which goes into source distributions."""
        found = [path for path in SOURCES.rglob("*") if "__pycache__" not in path.parts]
        inside = [os.path.relpath(path, ROOT) for path in found if path.is_file()]
        return [*super().get_source_files(), *sorted(inside)]


class TaggedWheel(bdist_wheel):
    """Tag a wheel with libraries for every Python, since they have no symbols of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


COMMANDS = {"bdist_wheel": TaggedWheel, "build_ext": BuildLibraries, "build_py": BuildPython}
