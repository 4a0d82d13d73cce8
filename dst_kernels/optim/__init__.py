"""Optimizers that make the gradients of masked weights and thresholds inside their step."""

from .adamw import DSTAdamW
from .sgd import DSTSGD

__all__ = ["DSTSGD", "DSTAdamW"]
