"""Wrap setuptools' build backend, and ask for torch where its headers are needed and missing.

torch is no fixed requirement of the build, since an isolated build would then install it once
more, several GB, beside the one that the environment has.
"""

from __future__ import annotations

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from . import commands, environment

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    try:
        any_wanted = None in commands.wanted().values()
    except environment.BuildError as error:
        raise SystemExit(f"dst_kernels: {error}") from None
    if not any_wanted or environment.torch_headers() is not None:
        return []
    return ["torch>=" + ".".join(map(str, environment.OLDEST_TORCH))]
