"""Measures suites in order of priority until everything is done or the time is up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .cases import Case, Suite
from .ceilings import measure_ceilings
from .correctness import Expectation
from .display import Display
from .environment import Environment
from .errors import WrongResultError, first_line
from .measure import DeviceLostError, measure
from .problem import Problem
from .providers import Provider, available_passes, providers_for
from .results import ERROR, SKIPPED, Row, Run

__all__ = ["Outcome", "already_measured", "run_suite"]

# Compared with the compiled providers, so measured in the same run as they.
_ANCHORS = ("dense", "auto")
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
        same = (row.gpu, row.torch, row.triton, row.commit) == (
            here.gpu,
            here.torch,
            here.triton,
            here.commit,
        )
        if same and row.metric in ("time", ERROR, SKIPPED):
            reached.setdefault((row.case, row.provider), set()).add(row.pass_)
    return {
        (case.name, provider.name)
        for case in suite.cases
        for provider in providers_for(case.op)
        if "" in (passes := reached.get((case.name, provider.name), set()))
        or passes.issuperset(available_passes(provider, case.op))
    }


def run_suite(
    suite: Suite,
    run: Run,
    device: torch.device,
    display: Display,
    *,
    names: list[str] | None = None,
    deadline: float = float("inf"),
    done: Iterable[tuple[str, str]] = (),
) -> Outcome:
    """Measure the ceilings, then every case of the suite.

    Args:
        names: of the providers, else all.
        deadline: on the clock of `time.monotonic`; nothing is begun after it.
        done: (case, provider) to leave alone.
    """
    done = set(done)
    outcome = Outcome()
    work = [
        (case, pending)
        for compiled in (False, True)
        for case in (suite.compiled_cases if compiled and not names else suite.cases)
        if (pending := _pending(case, compiled, names, done))
    ]
    display.begin(sum(len(providers) for _, providers in work))
    if work and time.monotonic() < deadline:
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
    case: Case, compiled: bool, names: list[str] | None, done: set[tuple[str, str]]
) -> list[Provider]:
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
        self, case: Case, providers: list[Provider], names: list[str] | None
    ) -> list[Provider]:
        """Before compiled providers, those they are compared with, unless measured in this run."""
        if not providers[0].compiled:
            return providers
        anchors = [
            provider
            for provider in providers_for(case.op, names)
            if provider.name in _ANCHORS and (case.name, provider.name) not in self._measured
        ]
        return anchors + providers

    def measure_case(self, case: Case, providers: list[Provider], names: list[str] | None) -> None:
        """Those of `providers` for which there is time."""
        fits = [one for one in providers if self._left() > self._expected(one)]
        self._leave_out(case, [one for one in providers if one not in fits])
        if not fits:
            return
        try:
            problem = Problem(case, self._device)
            with problem.mode.matmul_precision():
                expectation = Expectation(problem)
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
            self._measure(provider, problem, expectation)
            if provider.compiled:
                self._compilation = max(self._compilation, time.monotonic() - begin)
        if self._device.type == "cuda":
            del problem, expectation
            torch.cuda.empty_cache()

    def _measure(self, provider: Provider, problem: Problem, expectation: Expectation) -> None:
        case = problem.case
        name = f"{case.name}: {provider.name}"
        self._display.now(name)

        def add(pass_name: str, metric: str, value: float | str, unit: str = "") -> None:
            self._add(case, provider, pass_name, metric, value, unit)
            if metric in (ERROR, SKIPPED):
                kind = "wrong" if metric == ERROR else "no figure"
                self._display.say(f"{name} {pass_name} {kind}: {value}")

        try:
            measure(provider, problem, expectation, add)
        except (WrongResultError, DeviceLostError) as error:
            self._outcome.wrong.setdefault(case.name, []).append(provider.name)
            if isinstance(error, DeviceLostError):
                raise
        self._measured.add((case.name, provider.name))
        self._outcome.measured += 1
        self._display.advance()

    def _add(self, case: Case, provider: Provider, pass_name: str, *figure) -> None:
        self._run.add(self._suite.name, case, provider.name, pass_name, *figure)

    def _expected(self, provider: Provider) -> float:
        return self._compilation if provider.compiled else 0.0

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _leave_out(self, case: Case, providers: list[Provider]) -> None:
        for provider in providers:
            self._outcome.left_out.setdefault(case.name, []).append(provider.name)
            self._display.advance()
