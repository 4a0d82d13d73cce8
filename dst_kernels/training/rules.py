"""Define which values options and files may have: in words, as a test, and as text."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, Union

from torch import Tensor

from .errors import UsageError

MOST = 1e30  # torch's steps take no scalar that float32 cannot hold


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
    """Accept numbers of at most 1e30 in size for which `inside` is true."""

    def holds(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) <= MOST and inside(value)

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
PAIRS = TEXT._replace(accepted="name=value pairs", metavar="NAME=VALUE,...")
FLAG = Rule("true or false", lambda value: isinstance(value, bool))


Form: TypeAlias = Union[Rule, "Mapping[Any, Form]", "list[Any]"]
"""A rule for a value; a form for each key of a dict; in a list, the form of all its items."""


def check(name: str, value: Any, form: Form) -> None:
    """Raise UsageError unless `value` has the form; the message says what was found, and where.

    `name` is that of an option, or of a file with a colon behind it.
    """
    if isinstance(form, Rule):
        if not form.holds(value):
            raise UsageError(f"{name} is {_shown(value)}. Accepted: {form.accepted}.")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise UsageError(f"{name} is {_shown(value)}. Accepted: a list.")
        for index, item in enumerate(value):
            check(f"{name}[{index}]", item, form[0])
    else:
        keys = f"Accepted: the keys {', '.join(map(str, form))}." if form else "Accepted: no keys."
        if not isinstance(value, dict):
            raise UsageError(f"{name} is {_shown(value)}. {keys}")
        for problem, odd in (("lacks", set(form) - set(value)), ("has", set(value) - set(form))):
            if odd:
                found = reprlib.repr(sorted(odd, key=str))[1:-1]
                raise UsageError(f"{name} {problem} {found}. {keys}")
        for key, part in form.items():
            check(name + (" " if name.endswith(":") else ".") + str(key), value[key], part)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)} on {value.device}"
    return reprlib.repr(value)
