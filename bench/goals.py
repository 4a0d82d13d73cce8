"""What is to be reached, as data."""

from __future__ import annotations

from .goals_layers import LAYER_GOALS
from .goals_models import MODEL_GOALS
from .goals_weights import WEIGHT_GOALS

__all__ = ["GOALS"]

GOALS = (*MODEL_GOALS, *WEIGHT_GOALS, *LAYER_GOALS)
