"""Who is measured, by the op of a case.

To add a contender, put it into the tuple of its op, in the file of its kind: `layers`, `weights` or
`models`. It is verified, timed, reported and can be filtered from then on.
"""

from __future__ import annotations

import torch

from ..cases import Case
from . import layers, models, weights
from .work import Contender

# In the order of measurement.
CONTENDERS: dict[str, tuple[Contender, ...]] = {"linear": layers.LINEAR, "conv": layers.CONV}
CONTENDERS |= {"weights": weights.WEIGHTS, "model": models.MODELS, "training": models.TRAININGS}

# What is right: the reference backend, layer by layer. Not timed.
REFERENCES = {"linear": layers.REFERENCE_LINEAR, "conv": layers.REFERENCE_CONV}
REFERENCES |= {"weights": weights.REFERENCE, "model": models.REFERENCE}
REFERENCES["training"] = models.REFERENCE

# What the compiled contenders are compared with, so measured again in the same run as they.
ANCHORS = ("dense", "auto", "deferred")


def contenders_for(case: Case, compiled: bool | None = None) -> list[Contender]:
    """Return the contenders of a case; only those that do or do not compile where asked."""
    return [one for one in CONTENDERS[case.op] if compiled in (None, one.compiled)]


def problem_of(case: Case, device: torch.device) -> layers.Problem | weights.Problem | models.Setup:
    """Return a case with its data on a device; raises what keeps the data from fitting there."""
    kinds = {"weights": weights.Problem, "model": models.Setup, "training": models.Setup}
    return kinds.get(case.op, layers.Problem)(case, device)
