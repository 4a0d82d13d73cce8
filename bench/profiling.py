"""Profiles the kernels furthest from their ceiling and writes what bounds them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import AnyCase, ModelCase
from .errors import UsageError, require_one_of
from .files import write_text
from .floors import Distance, distance_of, distinct_first, ranking
from .kinds import providers_for
from .measurements import Measurements
from .ncu import NcuError, find_ncu, launches_in, run_ncu
from .profiled import arguments
from .report import versions
from .report_profile import profile_section

__all__ = ["Target", "one_target", "profile_all", "worst_targets"]

_LONGEST = 150.0  # seconds for a kernel: torch starts, Triton compiles, ncu replays a dozen times


@dataclass(frozen=True)
class Target:
    """A pass to profile; `distance`: from its floor, None without one."""

    case: AnyCase
    provider: str
    pass_name: str
    distance: Distance | None

    @property
    def title(self) -> str:
        return f"{self.case.name}, {self.provider}, {self.pass_name}"


def worst_targets(found: Measurements, count: int) -> list[Target]:
    """The `count` kernels of ours furthest from their ceiling, each once before any twice.

    Raises UsageError without any.
    """
    chosen = distinct_first(ranking(found))[:count]
    if not chosen:
        raise UsageError(
            f"CSV has no time of a kernel of ours with its ceilings on {found.gpu}. Accepted: "
            "results of the suites linear, conv or streaming; or --case, --provider and --pass."
        )
    return [Target(one.case, one.provider, one.pass_name, one) for one in chosen]


def one_target(found: Measurements, case: str, provider: str, pass_name: str) -> Target:
    """Raises UsageError for what CSV has no time of."""
    cases = [name for name, about in found.cases.items() if not isinstance(about, ModelCase)]
    require_one_of("--case", case, cases)
    about = found.cases[case]
    times = {
        (one.name, name): found.newest(case, one.name, name, "time")
        for one in providers_for(about.op)
        for name in one.passes
    }
    measured = [pair for pair, seconds in times.items() if seconds is not None]
    require_one_of("--provider", provider, list(dict.fromkeys(name for name, _ in measured)))
    require_one_of("--pass", pass_name, [name for one, name in measured if one == provider])
    distance = distance_of(found, about, provider, pass_name)
    return Target(about, provider, pass_name, distance)


def profile_all(
    found: Measurements, targets: Sequence[Target], folder: Path, seconds: float
) -> list[str]:
    """Profile each target into FOLDER/profile.md and profile.csv; what failed.

    Both files are written anew after each kernel, so that what ends the command costs no more than
    one. Nothing is begun after `seconds`. Raises UsageError without ncu or a GPU.
    """
    ncu = find_ncu()
    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here. Accepted: a machine with a GPU.")
    deadline = time.monotonic() + seconds
    parts = [
        f"# What bounds our kernels\n\nProfiled on {torch.cuda.get_device_name()} by Nsight "
        "Compute, clocks as they are, caches emptied before every kernel. Times and floors: "
        f"{versions(found)}."
    ]
    tables, failed = [], []
    for target in targets:
        parts.append(f"## `{target.case.name}`: {target.provider}, {target.pass_name}")
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise NcuError("no time left")
            text = run_ncu(ncu, _command(target), min(left, _LONGEST))
        except NcuError as error:
            parts.append(f"Not profiled: {error}.")
            failed.append(f"{target.title}: {error}")
        else:
            parts.append(profile_section(target.distance, launches_in(text)))
            tables.append(f"# {target.title}\n{text.rstrip()}\n")
        write_text(folder / "profile.md", "\n\n".join(parts) + "\n")
        write_text(folder / "profile.csv", "\n".join(tables))
    return failed


def _command(target: Target) -> list[str]:
    about = arguments(target.case, target.provider, target.pass_name)
    return [sys.executable, "-m", "bench.profiled", *about]
