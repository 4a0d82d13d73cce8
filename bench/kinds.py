"""What belongs to each kind of case: its providers, their passes, how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cases import CONV, LINEAR, MASKED_WEIGHT, MODEL, OPS, WEIGHT_LIST, AnyCase
from .errors import require_one_of
from .list_providers import LIST_PROVIDERS
from .measure import Measure, load_case
from .measure_list import load_list_case
from .measure_model import load_model_case
from .model_providers import MODEL_PROVIDERS
from .providers import CONV_PROVIDERS, LINEAR_PROVIDERS, WEIGHT_PROVIDERS

__all__ = ["KINDS", "Kind", "all_names", "load", "providers_for"]


@dataclass(frozen=True)
class Kind:
    """Cases of one op.

    Args:
        providers: who is measured, in that order; each has a name, `compiled` and `passes`.
        load: makes the data of a case on a device, and from it what measures a provider.
    """

    providers: Sequence[Any]
    load: Callable[[Any, torch.device], Measure]


KINDS = {
    LINEAR: Kind(LINEAR_PROVIDERS, load_case),
    CONV: Kind(CONV_PROVIDERS, load_case),
    MASKED_WEIGHT: Kind(WEIGHT_PROVIDERS, load_case),
    WEIGHT_LIST: Kind(LIST_PROVIDERS, load_list_case),
    MODEL: Kind(MODEL_PROVIDERS, load_model_case),
}


def all_names() -> list[str]:
    """Of the providers of any op."""
    return list(dict.fromkeys(one.name for op in OPS for one in KINDS[op].providers))


def providers_for(op: str, names: list[str] | None = None) -> list[Any]:
    """The providers of an op, in the order of measurement; only those in `names` where given.

    Raises UsageError for a name that no op has.
    """
    for name in names or ():
        require_one_of("--provider", name, all_names())
    return [one for one in KINDS[op].providers if not names or one.name in names]


def load(case: AnyCase, device: torch.device) -> Measure:
    """What measures a provider on a case."""
    return KINDS[case.op].load(case, device)
