"""The rule of authors.py under its former name, for tests/compiled."""

from .authors import gradients, mask

__all__ = ["gradients", "mask"]
