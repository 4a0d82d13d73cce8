"""What processes of their own are given to do."""

from __future__ import annotations

import os
import time


def act(task: str) -> None:
    if task == "raise":
        raise ValueError("of no use")
    if task == "die":
        os._exit(7)
    if task == "sleep":
        time.sleep(600)


class Unreadable:
    """A function that arrives in no other process."""

    def __call__(self, task: str) -> None:
        pass

    def __reduce__(self):
        return os._exit, (9,)
