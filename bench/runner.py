"""Measures suites in order of priority until everything is done or the time is up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import AnyCase
from .ceilings import measure_ceilings
from .display import Display
from .environment import CPU, Environment
from .errors import WrongResultError, first_line
from .kinds import load, providers_for
from .measure import DeviceLostError, Measure, one_thread
from .results import ERROR, SKIPPED, Row, Run
from .suites import Suite

__all__ = ["Outcome", "already_measured", "run_suite"]

# Compared with the compiled providers, so measured in the same run as they.
_ANCHORS = ("dense", "auto", "deferred")
_FIRST_COMPILATION = {"cuda": 45.0, "cpu": 10.0}  # seconds to expect of the first one


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        measured: pairs of case and provider.
        wrong, left_out: providers by case, those that are wrong and those for which the time was
            too short.
        lost: why the device cannot be used any more, else None.
    """

    measured: int = 0
    wrong: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lost: str | None = None


def already_measured(rows: Iterable[Row], suite: Suite, here: Environment) -> set[tuple[str, str]]:
    """(case, provider) that these rows hold whole, for this device, these versions, this commit."""
    reached: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if here.made(row) and row.metric in ("time", ERROR, SKIPPED):
            reached.setdefault((row.case, row.provider), set()).add(row.pass_)
    return {
        (case.name, provider.name)
        for case in suite.cases_on("cpu" if here.gpu == CPU else "cuda")
        for provider in providers_for(case.op)
        if "" in (passes := reached.get((case.name, provider.name), set()))
        or passes.issuperset(provider.passes)
    }


def run_suite(
    suite: Suite,
    run: Run,
    device: torch.device,
    display: Display,
    *,
    names: list[str] | None = None,
    compiled: bool = True,
    deadline: float = float("inf"),
    done: Iterable[tuple[str, str]] = (),
) -> Outcome:
    """Measure the ceilings, then every case of the suite.

    Args:
        names: of the providers, else all.
        compiled: whether those that go through torch.compile are measured, too.
        deadline: on the clock of `time.monotonic`; nothing is begun after it.
        done: (case, provider) to leave alone.
    """
    done = set(done)
    outcome = Outcome()
    cases = suite.cases_on(device.type)
    stages = [(False, cases)]
    if compiled:
        stages.append((True, cases if names else suite.compiled_cases_on(device.type)))
    work = [
        (case, pending)
        for compiling, those in stages
        for case in those
        if (pending := _pending(case, compiling, names, done))
    ]
    display.begin(sum(len(providers) for _, providers in work))
    if work and time.monotonic() < deadline:
        with one_thread(device):
            measure_ceilings(run, suite.name, device)
    worker = _Runner(suite, run, device, display, deadline, outcome)
    for case, providers in work:
        try:
            worker.measure_case(case, providers, names)
        except DeviceLostError as error:
            outcome.lost = str(error)
            break
    return outcome


def _pending(
    case: AnyCase, compiled: bool, names: list[str] | None, done: set[tuple[str, str]]
) -> list[Any]:
    return [
        provider
        for provider in providers_for(case.op, names)
        if provider.compiled == compiled and (case.name, provider.name) not in done
    ]


class _Runner:
    def __init__(
        self,
        suite: Suite,
        run: Run,
        device: torch.device,
        display: Display,
        deadline: float,
        outcome: Outcome,
    ) -> None:
        self._suite, self._run, self._device, self._display = suite, run, device, display
        self._deadline, self._outcome = deadline, outcome
        self._compilation = _FIRST_COMPILATION[device.type]
        self._measured: set[tuple[str, str]] = set()

    def _with_anchors(
        self, case: AnyCase, providers: list[Any], names: list[str] | None
    ) -> list[Any]:
        """Before compiled providers, those they are compared with, unless measured in this run."""
        if not providers[0].compiled:
            return providers
        anchors = [
            provider
            for provider in providers_for(case.op, names)
            if provider.name in _ANCHORS and (case.name, provider.name) not in self._measured
        ]
        return anchors + providers

    def measure_case(self, case: AnyCase, providers: list[Any], names: list[str] | None) -> None:
        """Those of `providers` for which there is time."""
        fits = [one for one in providers if self._left() > self._expected(one)]
        self._leave_out(case, [one for one in providers if one not in fits])
        if not fits:
            return
        try:
            measure = load(case, self._device)
        except Exception as error:  # usually too big for the device
            for provider in fits:
                self._add(case, provider, "", SKIPPED, f"no data: {first_line(error)}")
                self._display.advance()
            return
        for provider in self._with_anchors(case, fits, names):
            if self._left() <= self._expected(provider):
                self._leave_out(case, [provider])
                continue
            begin = time.monotonic()
            self._measure(case, provider, measure)
            if provider.compiled:
                self._compilation = max(self._compilation, time.monotonic() - begin)
        if self._device.type == "cuda":
            del measure  # and the data that it holds
            torch.cuda.empty_cache()

    def _measure(self, case: AnyCase, provider: Any, measure: Measure) -> None:
        name = f"{case.name}: {provider.name}"
        self._display.now(name)

        def add(pass_name: str, metric: str, value: float | str, unit: str = "") -> None:
            self._add(case, provider, pass_name, metric, value, unit)
            if metric in (ERROR, SKIPPED):
                kind = "wrong" if metric == ERROR else "no figure"
                self._display.say(f"{name} {pass_name} {kind}: {value}")

        try:
            measure(provider, add)
        except (WrongResultError, DeviceLostError) as error:
            self._outcome.wrong.setdefault(case.name, []).append(provider.name)
            if isinstance(error, DeviceLostError):
                raise
        self._measured.add((case.name, provider.name))
        self._outcome.measured += 1
        self._display.advance()

    def _add(self, case: AnyCase, provider: Any, pass_name: str, *figure) -> None:
        self._run.add(self._suite.name, case, provider.name, pass_name, *figure)

    def _expected(self, provider: Any) -> float:
        return self._compilation if provider.compiled else 0.0

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _leave_out(self, case: AnyCase, providers: list[Any]) -> None:
        for provider in providers:
            self._outcome.left_out.setdefault(case.name, []).append(provider.name)
            self._display.advance()
