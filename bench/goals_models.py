"""What is to be reached by whole training steps, and by kernels over a whole model's weights."""

from __future__ import annotations

from .cases import AnyCase, ListCase, ModelCase
from .ceilings import COPY
from .environment import CPU
from .goal import Goal
from .measurements import Measurements
from .model_providers import STEP
from .suites import SUITES

__all__ = ["MODEL_GOALS"]

_EAGER, _GRAPH = "time", "graph_time"


def _ratio(metric: str, ours: str, other: str):
    return lambda found, case: found.ratio(case.name, STEP, metric, ours, other)


def _worse_of_both(found: Measurements, case: AnyCase) -> float | None:
    """Eager or as a graph."""
    both = [_ratio(metric, "deferred", "dense")(found, case) for metric in (_EAGER, _GRAPH)]
    return None if None in both else max(both)


def _to_compiled(found: Measurements, case: AnyCase) -> float | None:
    return found.time_ratio(case.name, STEP, "deferred", "dst_compiled")


def _more_launches(found: Measurements, case: AnyCase) -> float | None:
    return found.difference(case.name, STEP, "launches", "deferred", "dense")


def _bandwidth(pass_name: str):
    return lambda found, case: found.share_of_ceiling(
        case.name, "auto", pass_name, "bandwidth", COPY
    )


_LAYER_STEPS = SUITES["steps"].cases
_AT_1K = tuple(case for case in _LAYER_STEPS if case.batch == 1024)
_AT_8K = tuple(case for case in _LAYER_STEPS if case.batch == 8192)
_MODELS = tuple(case for case in SUITES["models"].cases if case.batch == 128 or case.model == "gpt")
_VGG = tuple(case for case in _MODELS if case.model == "vgg-16")
_LISTS = tuple(case for case in SUITES["streaming"].cases if isinstance(case, ListCase))
_LENET_ON_CPU = (ModelCase("lenet-300-100", 64, "fp32"),)

MODEL_GOALS = (
    Goal(
        "4096² step at 1k tokens, graph: deferred ÷ dense",
        0.85,
        _AT_1K,
        _ratio(_GRAPH, "deferred", "dense"),
    ),
    Goal(
        "4096² step at 8k tokens, graph: deferred ÷ dense",
        0.97,
        _AT_8K,
        _ratio(_GRAPH, "deferred", "dense"),
    ),
    Goal(
        "4096² step, eager and graph: deferred ÷ dense, worst", 1.00, _LAYER_STEPS, _worse_of_both
    ),
    Goal("4096² step at 1k tokens: deferred ÷ compiled DST", 0.80, _AT_1K, _to_compiled),
    *(
        Goal(
            f"whole models, {mode}: {name} ÷ dense, worst",
            limit,
            _MODELS,
            _ratio(metric, name, "dense"),
        )
        for name, limit in (("deferred", 1.00), ("grouped", 1.05))
        for metric, mode in ((_EAGER, "eager"), (_GRAPH, "graph"))
    ),
    Goal(
        "VGG-16 step, eager: deferred ÷ eager DST",
        0.50,
        _VGG,
        _ratio(_EAGER, "deferred", "dst_eager"),
    ),
    Goal(
        "whole models: launches of deferred less those of dense, worst", 3, _MODELS, _more_launches
    ),
    *(
        Goal(
            f"{name} over all weights of a model, of copy bandwidth",
            0.90,
            _LISTS,
            _bandwidth(name),
            at_least=True,
        )
        for name in ("pack", "post", "sgd", "adamw")
    ),
    Goal(
        "LeNet-300-100 step on a CPU: deferred ÷ dense",
        1.25,
        _LENET_ON_CPU,
        _ratio(_EAGER, "deferred", "dense"),
        device=CPU,
    ),
)
