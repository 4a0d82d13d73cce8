"""Times every tile that the fused products of a case can run in, and checks what each computes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import AnyCase, LayerCase
from .display import Display
from .environment import Environment
from .errors import UsageError, WrongResultError, first_line, require_one_of
from .measure import DeviceLostError, one_thread, record_failure
from .problem import Problem
from .suites import SUITES
from .tile_rows import NO, YES, TileRow, TilesFile
from .timing import Timing, device_time
from .tune_compile import Compilation, compilations, compile_kernels
from .tune_products import PRODUCTS, Call, Launches, calls, in_tile, launches_of, split_of
from .workers import run_each

__all__ = ["TUNED_SUITES", "Sweep", "check_device", "tuned_cases"]

TUNED_SUITES = ("linear", "conv", "streaming")
"""The most valuable first."""

_SHARE_OF_COMPILING = 0.5  # of the time: what is not compiled by then is where it is timed
# What another order of a float32 sum may change, in the unit of the largest result.
_FLOAT32_SUMS = 1e-4


def tuned_cases(
    suites: Sequence[str], device_type: str, parts: Sequence[str] = ()
) -> list[LayerCase]:
    """Those of the suites that have tiles to choose; only those whose name contains one of `parts`
    where given.

    Raises UsageError for an unknown suite and where nothing is left.
    """
    for name in suites:
        require_one_of("--suite", name, list(SUITES))
    every = [case for name in suites for case in SUITES[name].cases_on(device_type)]
    cases = [case for case in dict.fromkeys(every) if case.op in PRODUCTS]
    if not cases:
        raise UsageError(
            f"--suite {', '.join(suites)} has no single layer or weight. "
            f"Accepted: {', '.join(name for name in SUITES if _any_tuned(SUITES[name].cases))}."
        )
    for part in parts:
        if not any(part in case.name for case in cases):
            raise UsageError(
                f"--case {part!r} is in no case's name. "
                f"Accepted: part of one of {', '.join(case.name for case in cases)}."
            )
    return [case for case in cases if not parts or any(part in case.name for part in parts)]


def _any_tuned(cases: Iterable[AnyCase]) -> bool:
    return any(case.op in PRODUCTS for case in cases)


def check_device(device: torch.device) -> None:
    """Raise UsageError where Triton's kernels cannot run."""
    from dst_kernels.backends import unavailable

    reason = unavailable("triton", device)
    if reason is not None:
        raise UsageError(
            f"--device is '{device.type}', where Triton's kernels cannot run: {reason}. Accepted: "
            "a CUDA device, or a CPU with TRITON_INTERPRET=1."
        )


@dataclass
class Sweep:
    """Measures cases into a file.

    Args:
        deadline: on the clock of `time.monotonic`; nothing is begun after it.
        known: rows of the same code to go on from.

    Attributes:
        timed, without: how many tiles have a time, and a reason for none.
        left_out: products of cases for which the time was too short.
        lost: why the device cannot be used any more, else None.
    """

    file: TilesFile
    environment: Environment
    device: torch.device
    display: Display
    deadline: float = float("inf")
    known: Sequence[TileRow] = ()
    timed: int = 0
    without: int = 0
    left_out: list[str] = field(default_factory=list)
    lost: str | None = None

    def __post_init__(self) -> None:
        self._done = {row.key for row in self.known}
        # (case, product) whose chosen tile does not run, so that there is nothing to compare with.
        self._broken = {row.key[:2] for row in self.known if row.is_chosen and row.reason}

    def compile_ahead(self, cases: Sequence[LayerCase], jobs: int) -> None:
        """Fill Triton's cache; a tile that ends the compiler's process is recorded as that."""
        if self._is_late():
            return
        tasks = [
            task for task in compilations(cases) if self._key(task, task.tile) not in self._done
        ]
        begin = time.monotonic()
        end = begin + _SHARE_OF_COMPILING * (self.deadline - begin)
        self.display.begin(len(tasks))
        self.display.now(f"compiling in {jobs} processes")
        finished = 0
        try:
            for outcome in run_each(compile_kernels, tasks, jobs, end):
                finished += 1
                self.display.advance()
                if outcome.died:  # what merely raises does so again, and is recorded, where it runs
                    task, reason = outcome.task, f"compiling it {outcome.problem}"
                    self._add(task, task.tile, task.chosen, reason=reason)
        except RuntimeError as error:
            self.display.say(f"compiled one at a time, while timing: {error}")
        took = time.monotonic() - begin
        self.display.say(f"{finished} of {len(tasks)} tiles compiled ahead in {took:.0f} s")

    def measure(self, cases: Sequence[LayerCase]) -> None:
        """Every tile of every product, in order."""
        self.display.begin(sum(len(PRODUCTS[case.op]) for case in cases))
        with one_thread(self.device):
            for case in cases:
                try:
                    self._measure_case(case)
                except DeviceLostError as error:
                    self.lost = str(error)
                    return

    def _measure_case(self, case: LayerCase) -> None:
        if self._is_late():
            self._leave_out(case, PRODUCTS[case.op])
            return
        with case.mode.precision():
            try:
                products = calls(Problem(case, self.device))
            except Exception as error:  # usually too big for the device
                for name in PRODUCTS[case.op]:
                    about = _Product(case, name)
                    self._add(about, None, False, reason=f"no data: {first_line(error)}")
                    self.display.advance()
                return
            for name, call in products.items():
                if self._is_late():
                    self._leave_out(case, [name])
                    continue
                self.display.now(f"{case.name}: {name}")
                if (case.name, name) not in self._broken:
                    self._measure_product(_Product(case, name), call)
                self.display.advance()
        if self.device.type == "cuda":
            del products, call  # and the data that they hold
            torch.cuda.empty_cache()

    def _measure_product(self, about: _Product, call: Call) -> None:
        launches = launches_of(call)
        if launches.error is not None:
            chosen = launches.chosen
            self._add_failure(about, chosen, chosen is not None, launches.error)
            return
        for tile in launches.tiles:
            if self._key(about, tile) in self._done:
                continue
            if self._is_late():
                self._leave_out(about.case, [about.product])
                return
            chosen = tile == launches.chosen
            try:
                timing = self._timing(call, launches, tile)
            except WrongResultError as error:
                self._add(about, tile, chosen, reason=str(error))
            except Exception as error:
                self._add_failure(about, tile, chosen, error)
            else:
                self._add(about, tile, chosen, timing=timing)

    def _timing(self, call: Call, launches: Launches, tile: Any) -> Timing:
        with _memory_of_nan():
            _compare(in_tile(call, tile), launches.results)
        return device_time(lambda: launches(tile), self.device)

    def _add_failure(self, about: _Product, tile: Any, chosen: bool, error: Exception) -> None:
        def add(name: str, metric: str, reason: str) -> None:
            self._add(about, tile, chosen, reason=reason)

        record_failure(add, "", error, self.device)

    def _add(
        self,
        about: _Product | Compilation,
        tile: Any,
        chosen: bool,
        *,
        timing: Timing | None = None,
        reason: str = "",
    ) -> None:
        """A row; `tile` is None where it is about all of them."""
        here, key = self.environment, self._key(about, tile)
        case, product, text, split = key
        times = ("", "") if timing is None else (f"{timing.median:.6g}", f"{timing.spread:.6g}")
        self.file.add(
            TileRow(
                *(case, about.case.dtype, product, text, split, YES if chosen else NO),
                *(*times, reason),
                *(here.gpu, here.torch, here.triton, here.commit, here.date),
            )
        )
        self._done.add(key)
        if timing is None:
            self.without += 1
            self._broken |= {key[:2]} if chosen else set()
            self.display.say(f"{case}: {product} {text}, split {split}: {reason}")
        else:
            self.timed += 1

    @staticmethod
    def _key(about: _Product | Compilation, tile: Any) -> tuple[str, str, str, str]:
        text = "-" if tile is None else str(tile)
        return about.case.name, about.product, text, str(split_of(tile))

    def _leave_out(self, case: LayerCase, products: Iterable[str]) -> None:
        for product in products:
            self.left_out.append(f"{case.name}: {product}")
            self.display.advance()

    def _is_late(self) -> bool:
        return time.monotonic() >= self.deadline


@dataclass(frozen=True)
class _Product:
    case: LayerCase
    product: str


def _compare(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise WrongResultError where results differ by more than the order of sums explains.

    That is one rounding to a 16-bit dtype, or several of float32.
    """
    for index, (result, right) in enumerate(zip(results, expected, strict=True)):
        allowed = max(torch.finfo(right.dtype).eps, _FLOAT32_SUMS) * right.abs().max().item()
        difference = (result.float() - right.float()).abs().max().item()
        if not difference <= allowed:  # NaN is wrong, too
            raise WrongResultError(
                f"result {index} is {difference:.3e} from that in the chosen tile, "
                f"where {allowed:.3e} is allowed"
            )


@contextlib.contextmanager
def _memory_of_nan() -> Iterator[None]:
    """New memory is full of NaN: it might else hold the right results of the tile before."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
