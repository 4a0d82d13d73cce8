"""Measures a suite in order of priority until everything is done or the time is up."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import operator
import re
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import results
from ..cases import Case, LayerCase, ModelCase, TrainingCase
from ..contenders import ANCHORS, contenders_for
from ..contenders.peers import set_threads
from ..contenders.work import Contender, Work, rates
from ..measurements import CEILING, COPY, GEMM
from ..results import ERROR, SKIPPED, UsageError, WrongResultError, first_line
from ..suites import Suite
from . import timing
from .display import Display
from .verify import Expectation

_SHORT = 1e-3  # below this many seconds launches matter: timed under a CUDA graph as well
_HOST_MATTERS = 5e-3  # above, nobody asks what a call costs the host
_STEP_SECONDS = 0.3  # a neighbour on the machine, or a busy host, should not decide
_SHOWN = ("forward_backward", "step", "post", "forward")  # the pass that is shown of a contender
_COMPILATION = {"cuda": 45.0, "cpu": 10.0}  # seconds to expect of the first
# Of the ceilings: bytes to copy, far beyond L2; side and dtype of a product bound by arithmetic.
_CEILINGS = {"cuda": (2**30, 8192, torch.bfloat16), "cpu": (2**24, 256, torch.float32)}

warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # on purpose

Add = Callable[..., None]  # add(pass, metric, value, unit) records one figure


class DeviceLostError(RuntimeError):
    """After a fault on the device nothing runs on it in this process any more."""


def measure(contender: Contender, expectation: Expectation, add: Add) -> None:
    """Verify a contender on a case, then time its passes; what fails is recorded with its reason.

    Raises WrongResultError, recorded too, and DeviceLostError.
    """
    case, device = expectation.case, expectation.device
    whole, recorded = isinstance(case, ModelCase), functools.partial(_recorded, add, device)
    # A training on one stream from the first step on: what autograd keeps must have begun where a
    # graph is captured, and a compiled model is not compiled again.
    stream = timing.one_stream(device) if whole else contextlib.nullcontext()
    try:
        with stream, case.mode.precision(tune=True), recorded(""):
            work = expectation.verified(contender)
            with recorded("forward", "saved: "):
                if (saved := work.saved_bytes()) is not None:
                    add("forward", "saved", saved, "B")
            for name in contender.passes:
                with recorded(name):
                    _measure_pass(name, contender, work, expectation, add)
    except WrongResultError as error:
        add("", ERROR, str(error))
        raise
    finally:
        if whole and device.type == "cuda":
            gc.collect()  # modules and their hooks are cycles, which hold gigabytes
            torch.cuda.empty_cache()


def _measure_pass(
    name: str, contender: Contender, work: Work, expectation: Expectation, add: Add
) -> None:
    case, device = expectation.case, expectation.device
    single, on_gpu = isinstance(case, LayerCase), device.type == "cuda"
    prepared, whole = work.prepare(name), isinstance(case, ModelCase)
    call = prepared.call
    if isinstance(case, TrainingCase):
        call()  # what fails, fails alone
        expectation.turns[contender.name] = call, add
        return
    with prepared.surroundings():
        if name == "step":
            taken = timing.wall_time(call, device, _STEP_SECONDS)
        else:
            taken = timing.device_time(call, device)
        add(name, "time", taken.median, "s")
        add(name, "spread", taken.spread, "s")
        if on_gpu:
            add(name, "memory", timing.peak_memory(call, prepared.memory_before), "B")
        if on_gpu and whole:
            with _recorded(add, device, name, "launches: "):
                add(name, "launches", timing.count_launches(call))
        elif on_gpu and taken.median < _HOST_MATTERS:
            add(name, "host_time", timing.host_time(call, device).median, "s")
    graph_seconds = None
    if on_gpu and contender.graphable and (taken.median < _SHORT or not single):
        with _recorded(add, device, name, "graph_time: "):
            if name == "step":
                expectation.verify_graph(contender)
                torch.cuda.empty_cache()  # a graph has memory of its own
            # Anew: a graph of backward alone needs its forward on the capturing stream.
            prepared = work.prepare(name)
            with prepared.surroundings():
                graph_seconds = timing.graph_time(prepared.call, whole).median
            add(name, "graph_time", graph_seconds, "s")
    # Calls with dozens of tensors are no shorter than the host, which is not their bandwidth.
    seconds = (not single and name != "step" and graph_seconds) or taken.median
    for metric, amount, unit in rates(case, name, prepared):
        add(name, metric, amount / seconds, unit)
        if metric == "throughput" and graph_seconds:
            add(name, f"graph_{metric}", amount / graph_seconds, unit)


@contextlib.contextmanager
def _recorded(add: Add, device: torch.device, name: str, what: str = "") -> Iterator[None]:
    """Record what is raised as the reason; a wrong result and a lost device end everything."""
    try:
        yield
    except (WrongResultError, DeviceLostError):
        raise
    except Exception as error:
        record_failure(add, name, error, device, what)


def record_failure(
    add: Add, name: str, error: Exception, device: torch.device, what: str = ""
) -> None:
    """Record why something has no figures; raises DeviceLostError where the device is gone."""
    reason = what + first_line(error)
    traceback.clear_frames(error.__traceback__)  # which hold the tensors that did not fit
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # what only one call reports has passed
            torch.cuda.synchronize(device)
        try:
            torch.cuda.synchronize(device)
        except Exception as fault:
            add(name, ERROR, f"the device faulted: {reason}")
            raise DeviceLostError(first_line(fault)) from error
        torch.cuda.empty_cache()
    add(name, SKIPPED, reason)


@dataclass
class Outcome:
    """What became of a run."""

    measured: int = 0  # pairs of case and contender
    wrong: dict[str, list[str]] = field(default_factory=dict)  # contenders by case
    left_out: dict[str, list[str]] = field(default_factory=dict)  # for want of time
    lost: str | None = None  # why the device cannot be used any more


def choose(named: Mapping[str, Any], filters: Sequence[str]) -> dict[str, Any]:
    """Return those named "CASE/CONTENDER" in which every filter is found, ignoring case.

    Raises UsageError for a filter that is no regular expression, and where nothing is left.
    """
    chosen = dict(named)
    for text in filters:
        try:
            pattern = re.compile(text, re.IGNORECASE)
        except re.error as error:
            reason = f"--filter is {text!r}: {error}. Accepted: a regular expression."
            raise UsageError(reason) from error
        before, chosen = chosen, {n: one for n, one in chosen.items() if pattern.search(n)}
        if not chosen:
            raise UsageError(
                f"--filter {text!r} is found in none of {len(before)} names. Accepted: part of "
                f"CASE/CONTENDER, such as {min(before, default='')!r}."
            )
    return chosen


def already_measured(
    rows: Iterable[results.Row], suite: Suite, device_type: str, here: results.Environment
) -> set[tuple[str, str]]:
    """Return the (case, contender) that rows of this device, versions and commit hold whole."""
    reached = {
        (row.case, row.provider, row.pass_)
        for row in rows
        if row.metric in ("time", ERROR, SKIPPED) and here.made(row)
    }
    return {
        (case.name, one.name)
        for case in suite.cases_on(device_type)
        for one in contenders_for(case)
        if (case.name, one.name, "") in reached
        or all((case.name, one.name, name) in reached for name in one.passes)
    }


def run_suite(
    suite: Suite,
    file: results.ResultsFile,
    device: torch.device,
    *,
    filters: Sequence[str] = (),
    compiled: bool = True,
    deadline: float = float("inf"),
    done: Collection[tuple[str, str]] = frozenset(),
) -> Outcome:
    """Measure the ceilings, then every case of the suite; what compiles comes last.

    It compiles for the first case only, unless `filters` chose. Nothing is begun after `deadline`,
    on the clock of `time.monotonic`; what is `done`, (case, contender), is left alone.
    """
    cases = suite.cases_on(device.type)
    compiling = (cases if filters else cases[:1]) if compiled else ()
    named = {
        f"{case.name}/{one.name}": (case, one)
        for compiles, some in ((False, cases), (True, compiling))
        for case in some
        for one in contenders_for(case, compiles)
    }
    pairs = choose(named, filters).values()
    missing = {(case, one) for case, one in pairs if (case.name, one.name) not in done}
    # Figures of one run are compared: what an earlier one measured is measured again.
    again = {
        (case, name) for case, one in missing for name in ANCHORS[: None if one.compiled else 1]
    }
    turns = {case for case, _ in missing if isinstance(case, TrainingCase)}
    again |= {(case, one.name) for case, one in pairs if case in turns}
    planned = [pair for pair in pairs if pair in missing or (pair[0], pair[1].name) in again]
    compilations: list[float] = []
    with Display() as display:
        run = _Run(suite.name, file, device, display)
        display.begin(len(planned))
        if planned and time.monotonic() < deadline:
            run.measure_ceilings()
        try:
            for case, group in itertools.groupby(planned, operator.itemgetter(0)):
                for _, one in group:
                    begin = time.monotonic()
                    expected = max(compilations, default=_COMPILATION[device.type])
                    if deadline - begin > expected * one.compiled:
                        run.measure(case, one)
                        compilations += [time.monotonic() - begin] * one.compiled
                    else:
                        run.outcome.left_out.setdefault(case.name, []).append(one.name)
                        display.advance()
                run.take_turns(case)
        except DeviceLostError as error:
            run.outcome.lost = str(error)
    return run.outcome


@dataclass
class _Run:
    suite: str
    file: results.ResultsFile
    device: torch.device
    display: Display
    outcome: Outcome = field(default_factory=Outcome)
    expectation: Expectation | None = None  # of the last case
    times: dict[tuple[Case, str], dict[str, float]] = field(default_factory=dict)  # of contenders

    def measure_ceilings(self) -> None:
        """Measure what the device can do at best: the yardstick of the goals."""
        size, side, dtype = _CEILINGS[self.device.type]
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        left, right = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in "ab")
        for name, call, metric, amount, unit in (
            (COPY, lambda: target.copy_(source), "bandwidth", 2 * size, "B/s"),
            (GEMM, lambda: left @ right, "flops", 2 * side**3, "FLOP/s"),
        ):
            taken = timing.device_time(call, self.device)
            rate = metric, amount / taken.median, unit
            for figure in (("time", taken.median, "s"), ("spread", taken.spread, "s"), rate):
                self.file.add(self.suite, name, CEILING, "forward", *figure)

    def measure(self, case: Case, contender: Contender) -> None:
        """Measure a contender, with the data of the case before where it is the same."""
        if self.device.type == "cpu":  # more on tiny tensors would measure the scheduler
            set_threads(getattr(case, "threads", 1))
        name = f"{case.name}: {contender.name}"
        times = self.times[case, contender.name] = {}
        self.display.now(name)

        def add(pass_name: str, metric: str, value: float | str, unit: str = "") -> None:
            self.file.add(self.suite, case, contender.name, pass_name, metric, value, unit)
            if metric == "time":
                times[pass_name] = value
            elif metric in (ERROR, SKIPPED):
                kind = "wrong" if metric == ERROR else "no figure"
                self.display.say(f"{name} {pass_name} {kind}: {value}")

        try:
            with _recorded(add, self.device, "", "no data: "):  # usually too big for the device
                if self.expectation is None or self.expectation.case != case:
                    self.expectation = None  # and the data that it holds
                    torch.cuda.empty_cache()
                    self.expectation = Expectation(case, self.device)
            if self.expectation is not None:
                self.outcome.measured += 1
                measure(contender, self.expectation, add)
        except (WrongResultError, DeviceLostError) as error:
            self.outcome.wrong.setdefault(case.name, []).append(contender.name)
            if isinstance(error, DeviceLostError):
                raise
        self.display.advance()
        self._show(case, contender.name)

    def take_turns(self, case: Case) -> None:
        """Time those who wait for their turns in a case."""
        turns = self.expectation.turns if self.expectation else {}
        if not turns:
            return
        self.display.now(f"{case.name}: in turns")
        set_threads(case.threads)
        with case.mode.precision():
            found = timing.in_turns({name: call for name, (call, _) in turns.items()}, "dense")
        for name, taken in found.items():
            turns[name][1]("step", "time", taken.median, "s")
            turns[name][1]("step", "spread", taken.spread, "s")
            self._show(case, name)
        turns.clear()

    def _show(self, case: Case, contender: str) -> None:
        times = self.times[case, contender]
        if shown := next((one for one in (*_SHOWN, *times) if one in times), None):
            dense = self.times.get((case, "dense"), {}).get(shown)
            over = f"{times[shown] / dense:.2f}" if dense else ""
            self.display.figure(case.name, contender, shown, times[shown], over)
