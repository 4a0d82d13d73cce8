"""What is to be reached where the weights decide: steps of one large layer, lists of weights, and
small steps on a CPU."""

from __future__ import annotations

from .cases import AnyCase, ListCase, ModelCase
from .environment import CPU
from .figures import bandwidth, ratio, time_ratio
from .goal import Goal
from .measurements import Measurements
from .model_providers import STEP
from .suites import SUITES

__all__ = ["WEIGHT_GOALS"]

_EAGER, _GRAPH = "time", "graph_time"


def _worse_of_both(found: Measurements, case: AnyCase) -> float | None:
    """Eager or as a graph."""
    both = [ratio(STEP, metric, "deferred", "dense")(found, case) for metric in (_EAGER, _GRAPH)]
    return None if None in both else max(both)


_LAYER_STEPS = SUITES["steps"].cases
_AT_1K = tuple(case for case in _LAYER_STEPS if case.batch == 1024)
_AT_8K = tuple(case for case in _LAYER_STEPS if case.batch == 8192)
_LISTS = tuple(case for case in SUITES["streaming"].cases if isinstance(case, ListCase))
_LENET_ON_CPU = (ModelCase("lenet-300-100", 64, "fp32"),)

WEIGHT_GOALS = (
    *(
        Goal(
            f"4096² step at {tokens} tokens, graph: deferred ÷ dense",
            limit,
            cases,
            ratio(STEP, _GRAPH, "deferred", "dense"),
        )
        for tokens, limit, cases in (("1k", 0.85, _AT_1K), ("8k", 0.97, _AT_8K))
    ),
    Goal(
        "4096² step, eager and graph: deferred ÷ dense, worst", 1.00, _LAYER_STEPS, _worse_of_both
    ),
    Goal(
        "4096² step at 1k tokens: deferred ÷ compiled DST",
        0.80,
        _AT_1K,
        time_ratio(STEP, "deferred", "dst_compiled"),
    ),
    *(
        Goal(
            f"{name} over all weights of a model, of copy bandwidth",
            0.90,
            _LISTS,
            bandwidth(name),
            at_least=True,
        )
        for name in ("pack", "post", "sgd", "adamw")
    ),
    Goal(
        "LeNet-300-100 step on a CPU: deferred ÷ dense",
        1.25,
        _LENET_ON_CPU,
        ratio(STEP, _EAGER, "deferred", "dense"),
        device=CPU,
    ),
)
