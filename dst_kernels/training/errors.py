"""Define the errors that the command line shows as a message instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class UsageError(ValueError):
    """Report input that the training command cannot use.

    The message names the argument, what was given and what is accepted.
    """

    exit_code = 2


class DivergedError(UsageError):
    """Report a loss that is infinite or NaN."""

    exit_code = 1


def require_one_of(argument: str, given: object, accepted: Collection[str], note: str = "") -> None:
    """Raise UsageError unless `given` is among the accepted names."""
    if isinstance(given, str) and given in accepted:
        return
    near = difflib.get_close_matches(str(given), accepted, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    listing = note or ", ".join(accepted)
    raise UsageError(f"{argument} {given!r:.200} is unknown.{hint} Accepted: {listing}.")
