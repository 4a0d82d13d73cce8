"""Define by what a run is judged: classifiers by accuracy, language models by perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .rules import MOST, Rule, number


class Task(NamedTuple):
    """Describe a measure of quality: its name, its values, and how training gets and shows it.

    `measure` computes it from the mean test loss (nats) and the share of right predictions.
    `scale` and the units are for showing it; `sizes` names those in the shape of an input.
    """

    quality: str
    values: Rule
    measure: Callable[[float, float], float]
    scale: float
    unit: str
    unit_of_differences: str
    sizes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the name of the measure in records, metrics.csv and summary.json."""
        return f"test_{self.quality}"

    @property
    def validation_key(self) -> str:
        """Return the name of the measure on the images or text that --validation holds out."""
        return f"validation_{self.quality}"

    @property
    def plot(self) -> str:
        """Return the name of the picture of the measure and the ratio over the epochs."""
        return f"{self.quality}_and_ratio.png"

    def show(self, value: float, form: str = ".2f") -> str:
        """Return the value as text."""
        return f"{self.scale * value:{form}}{self.unit}"

    def show_difference(self, difference: float) -> str:
        """Return a difference of two values as text."""
        return f"{self.scale * difference:+.2f}{self.unit_of_differences}"


CLASSIFICATION = Task(
    "accuracy",
    number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    lambda loss, share_right: share_right,
    scale=100,
    unit=" %",
    unit_of_differences=" points",
    sizes=("channels", "height", "width"),
)
LANGUAGE = Task(
    "perplexity",
    number("a number of at least 1 and at most 1e30", lambda value: value >= 1),
    lambda loss, share_right: math.exp(loss) if loss < math.log(MOST) else math.inf,
    scale=1,
    unit="",
    unit_of_differences="",
    sizes=("context",),
)


def task_of(dataset: object) -> Task:
    """Return what a data set, by its name, is for."""
    return LANGUAGE if dataset == "text" else CLASSIFICATION
