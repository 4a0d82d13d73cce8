"""Metadata lives in pyproject.toml; this file adds the compiled libraries that can be built here.

It neither imports torch nor looks for a GPU. Without a compiler the package is pure Python.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from dst_build.commands import COMMANDS, extensions
from dst_build.environment import BuildError

try:
    found = extensions()
except BuildError as error:
    raise SystemExit(f"dst_kernels: {error}") from None

setup(ext_modules=found, cmdclass=COMMANDS)
