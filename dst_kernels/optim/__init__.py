"""Offer optimizers that make the gradients of masked weights in their step, and a steered alpha."""

from .adamw import DSTAdamW
from .restore import RestoreCollapsed
from .sgd import DSTSGD
from .target import TargetRatio

__all__ = ["DSTSGD", "DSTAdamW", "RestoreCollapsed", "TargetRatio"]
