"""Metadata lives in pyproject.toml; this file is where compiled extensions will be declared.

It must not import torch or look for a GPU: metadata is read in build environments without either.
"""

from setuptools import setup

setup()
