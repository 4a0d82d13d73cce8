"""Hypothesis draws the same examples in every run and keeps no database."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("dst_kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("dst_kernels")
