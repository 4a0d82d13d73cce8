"""Offer optimizers that compute the gradients of masked weights and thresholds in their step."""

from .adamw import DSTAdamW
from .sgd import DSTSGD

__all__ = ["DSTSGD", "DSTAdamW"]
