"""What is to be reached by whole training steps on a GPU."""

from __future__ import annotations

from .cases import ModelCase
from .figures import best_ratio, difference, ratio
from .goal import Goal
from .model_providers import STEP
from .suites import SUITES

__all__ = ["MODEL_GOALS"]

_EAGER, _GRAPH = "time", "graph_time"
_MODES = {"eager": _EAGER, "graph": _GRAPH}


def _of(*models: str) -> tuple[ModelCase, ...]:
    return tuple(case for case in SUITES["model"].cases if case.model in models)


_LSTM = _of("lstm-a")
# No compiler takes an LSTM, and its launches are others'.
_ALL = tuple(case for case in SUITES["model"].cases if case not in _LSTM)
_LARGE = _of("resnet-50", "convnext-t", "vit-b-16", "gpt")
_CIFAR = _of("vgg-16", "wrn-28-8")
_SMALL = tuple(case for case in _ALL if case not in _LARGE)

_COMPILED_OR_DEFERRED = ("masked_compiled", "deferred", "deferred_compiled")

MODEL_GOALS = (
    *(
        Goal(
            f"{nets}, {mode}: grouped ÷ dense, worst",
            limit,
            cases,
            ratio(STEP, metric, "grouped", "dense"),
        )
        for nets, limit, cases in (("large models", 1.02, _LARGE), ("small models", 1.05, _SMALL))
        for mode, metric in _MODES.items()
    ),
    *(
        Goal(
            f"large models, compiled, {mode}: masked_compiled ÷ dense_compiled, worst",
            1.02,
            _LARGE,
            ratio(STEP, metric, "masked_compiled", "dense_compiled"),
        )
        for mode, metric in _MODES.items()
    ),
    *(
        Goal(
            f"feedforward models, {mode}: deferred ÷ dense, worst",
            1.00,
            _ALL,
            ratio(STEP, metric, "deferred", "dense"),
        )
        for mode, metric in _MODES.items()
    ),
    *(
        Goal(
            f"feedforward models, compiled, {mode}: deferred_compiled ÷ dense_compiled, worst",
            1.00,
            _ALL,
            ratio(STEP, metric, "deferred_compiled", "dense_compiled"),
        )
        for mode, metric in _MODES.items()
    ),
    *(
        Goal(
            f"{nets}: best of {', '.join(_COMPILED_OR_DEFERRED)} ÷ dst_compiled, worst",
            limit,
            cases,
            best_ratio(STEP, _COMPILED_OR_DEFERRED, ("dst_compiled",)),
        )
        for nets, limit, cases in (
            ("CIFAR models", 0.95, _CIFAR),
            ("other models", 1.00, tuple(case for case in _ALL if case not in _CIFAR)),
        )
    ),
    *(
        Goal(
            f"{model}, eager: {ours} ÷ dst_eager",
            limit,
            _of(model),
            ratio(STEP, _EAGER, ours, "dst_eager"),
        )
        for model, ours, limit in (
            ("vgg-16", "grouped", 0.60),
            ("vgg-16", "deferred", 0.50),
            ("wrn-28-8", "grouped", 0.80),
            ("resnet-50", "grouped", 0.92),
        )
    ),
    *(
        Goal(
            f"lstm-a, {mode}: masked ÷ {other}",
            limit,
            _LSTM,
            ratio(STEP, metric, "masked", other),
        )
        for mode, metric, other, limit in (
            ("eager", _EAGER, "dense", 1.50),
            ("graph", _GRAPH, "dense", 1.15),
            ("eager", _EAGER, "dst_eager", 0.02),
        )
    ),
    *(
        Goal(
            f"feedforward models: peak memory of {name} ÷ dense, worst",
            1.02,
            _ALL,
            ratio(STEP, "memory", name, "dense"),
        )
        for name in ("masked", "grouped", "deferred")
    ),
    Goal(
        "feedforward models: launches of deferred less those of dense, worst",
        3,
        _ALL,
        difference(STEP, "launches", "deferred", "dense"),
    ),
)
