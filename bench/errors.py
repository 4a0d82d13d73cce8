"""What can go wrong, by kind."""

from __future__ import annotations

__all__ = ["UsageError", "WrongResultError", "first_line", "require_one_of"]

_LONGEST = 300


class UsageError(ValueError):
    """Unusable input; the message names the argument, what was given and what is accepted."""


class WrongResultError(RuntimeError):
    """A provider computes something else than the reference."""


def require_one_of(argument: str, given: object, accepted: list[str]) -> None:
    """Raise UsageError unless `given` is among the accepted names."""
    if given not in accepted:
        raise UsageError(f"{argument} {given!r} is unknown. Accepted: {', '.join(accepted)}.")


def first_line(error: BaseException) -> str:
    """The error in one line of bounded length, so that one row of a CSV is one line.

    Two lines where the first ends in a colon: those of torch.compile name the cause in the second.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    text = ": ".join([type(error).__name__, " ".join(lines)]) if lines else type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
