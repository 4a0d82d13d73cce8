"""Define which values an option accepts: in words, as a test, and how to read them from text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Hold the words, the test and the parser of a rule.

    `parse` may raise ValueError; what it returns must still pass `holds`.
    """

    accepted: str
    holds: Callable[[Any], bool]
    parse: Callable[[str], Any] = str
    metavar: str = "NAME"


def integer(least: int, most: int | None = None) -> Rule:
    """Accept integers from `least` to `most` (None: no limit)."""

    def holds(value: Any) -> bool:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and value >= least and (most is None or value <= most)

    accepted = f"an integer of at least {least}"
    return Rule(accepted if most is None else f"{accepted} and at most {most}", holds, int, "INT")


def number(accepted: str, inside: Callable[[float], bool]) -> Rule:
    """Accept finite numbers for which `inside` is true."""

    def holds(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and inside(value)

    return Rule(accepted, holds, float, "NUMBER")


def or_none(rule: Rule) -> Rule:
    """Accept None, written "none", and what `rule` accepts."""
    return Rule(
        f"{rule.accepted}, or none",
        lambda value: value is None or rule.holds(value),
        lambda text: None if text == "none" else rule.parse(text),
        rule.metavar,
    )


def _ascending(milestones: Any) -> bool:
    return (
        isinstance(milestones, tuple)
        and all(integer(1).holds(epoch) for epoch in milestones)
        and list(milestones) == sorted(set(milestones))
    )


MILESTONES = Rule(
    "ascending epochs with commas between, such as 80,120",
    _ascending,
    lambda text: tuple(int(part) for part in text.split(",")),
    "INT,INT,...",
)
TEXT = Rule("a name", lambda value: isinstance(value, str) and value != "")
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
