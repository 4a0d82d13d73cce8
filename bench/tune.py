"""Times every tile that our fused products can run in, and says how good the chosen ones are.

tiles.csv has the format of results.csv: the contender is the tile, the pass is the product. What
the library takes has a second contender, "chosen".
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from dst_kernels.backends import unavailable

from .cases import Case
from .contenders import problem_of
from .measure.run import DeviceLostError, Display, choose, record_failure
from .measure.timing import device_time
from .measurements import CHOSEN
from .results import ERROR, SKIPPED, ResultsFile, UsageError, WrongResultError
from .suites import SUITES

_OF_LAYERS = ("forward", "grad_input", "grad_weight")
PRODUCTS = {"linear": _OF_LAYERS, "conv": _OF_LAYERS, "weights": ("pack", "post")}
_TUNED = ("linear", "conv", "streaming")  # the most valuable suite first
_COMPILING = 0.5  # share of the time; what is not compiled by then is where it is timed
_FLOAT32_SUMS = 1e-4  # what another order of a sum may change, in the unit of the largest result

Call = Callable[[], tuple[torch.Tensor, ...]]  # makes a product's results anew


class Task(NamedTuple):
    """A product of a case in one tile; `chosen`: the library's own choice."""

    case: Case
    product: str
    tile: Any
    chosen: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """The case, contender and pass of its rows."""
        split = getattr(self.tile, "split", 1)
        return self.case.name, f"{self.tile}{f' split {split}' * (split > 1)}", self.product


def tune(
    file: ResultsFile, device: torch.device, filters: Sequence[str], deadline: float, known: list
) -> str | None:
    """Time the tiles of those products whose CASE/PRODUCT fits; return why the device was lost.

    Each is checked against the chosen tile before. `known` rows are not repeated. Raises UsageError
    where Triton's kernels cannot run and where nothing fits.
    """
    if (reason := unavailable("triton", device)) is not None:
        raise UsageError(
            f"--device is '{device.type}', where Triton's kernels cannot run: {reason}. Accepted: "
            "a CUDA device, or a CPU with TRITON_INTERPRET=1."
        )
    every = [case for name in _TUNED for case in SUITES[name].cases_on(device.type)]
    pairs = {f"{case.name}/{name}": (case, name) for case in every for name in PRODUCTS[case.op]}
    done = {(row.case, row.provider, row.pass_) for row in known}
    with Display() as display:
        sweep = _Sweep(file, device, deadline, done, display)
        try:
            sweep.run([*choose(pairs, filters).values()])
        except DeviceLostError as error:
            return str(error)
    return None


class _Sweep(NamedTuple):
    file: ResultsFile
    device: torch.device
    deadline: float
    done: set[tuple[str, str, str]]
    display: Display

    def run(self, wanted: list[tuple[Case, str]]) -> None:
        if self.device.type == "cuda":
            self.compile_ahead(wanted)
        self.display.begin(len(wanted))
        for case, product in wanted:
            if time.monotonic() >= self.deadline:
                self.display.say("The time is up.")
                return
            try:
                with case.mode.precision():
                    self._measure(case, product, calls(problem_of(case, self.device))[product])
            except DeviceLostError:
                raise
            except Exception as error:  # too big for the device, or the chosen tile fails
                self._fail(Task(case, product, None), error)
            self.display.advance()

    def compile_ahead(self, wanted: list[tuple[Case, str]]) -> None:
        tasks = [task for pair in wanted for task in tasks_of(*pair) if task.key not in self.done]
        self.display.say(f"{len(tasks)} tiles are compiled ahead")
        end = time.monotonic() + _COMPILING * (self.deadline - time.monotonic())
        for task in compile_all(tasks, os.cpu_count() or 1, end):
            self._add(task, SKIPPED, "compiling it ends the process")

    def _measure(self, case: Case, product: str, call: Call) -> None:
        launches = Launches(call)
        for tile in launches.tiles:
            task = Task(case, product, tile, tile == launches.chosen)
            if task.key in self.done or time.monotonic() >= self.deadline:
                continue
            try:
                _verify(call, tile, launches.results)
                again = lambda tile=tile: [run(tile) for run in launches.runs]  # noqa: E731
                taken = device_time(again, self.device)
            except WrongResultError as error:
                self._add(task, ERROR, str(error))
            except Exception as error:
                self._fail(task, error)
            else:
                self._add(task, "time", taken.median, "s")
                self._add(task, "spread", taken.spread, "s")
                self.display.figure(case.name, task.key[1], product, taken.median, "")

    def _fail(self, task: Task, error: Exception) -> None:
        record_failure(lambda _, *figure: self._add(task, *figure), "", error, self.device)

    def _add(self, task: Task, metric: str, value: float | str, unit: str = "") -> None:
        for name in (task.key[1], *[CHOSEN] * task.chosen):
            self.file.add("tune", task.case, name, task.product, metric, value, unit)
        self.done.add(task.key)
        if isinstance(value, str):
            self.display.say(f"{' '.join(task.key)}: {value}")


def _verify(call: Call, tile: Any, expected: Sequence[torch.Tensor]) -> None:
    """Raise WrongResultError where a tile's results differ by more than the order of sums explains.

    That is one rounding to a 16-bit dtype, or several of float32.
    """
    before = torch.get_deterministic_debug_mode()
    # New memory is then full of NaN: it might else hold the right results of the tile before.
    torch.set_deterministic_debug_mode("error")
    try:
        results = Launches(call, tile).results
    finally:
        torch.set_deterministic_debug_mode(before)
    for index, (result, right) in enumerate(zip(results, expected, strict=True)):
        allowed = max(torch.finfo(right.dtype).eps, _FLOAT32_SUMS) * right.abs().max().item()
        difference = (result.float() - right.float()).abs().max().item()
        if not difference <= allowed:  # NaN is wrong, too
            off = f"result {index} is {difference:.3e} from that in the chosen tile"
            raise WrongResultError(f"{off}, where {allowed:.3e} is allowed")


def calls(problem: Any) -> dict[str, Call]:
    """Return the products of a case by name, each as Triton's kernels make it."""
    from dst_kernels.backends import triton as ours
    from dst_kernels.reference.conv import Geometry

    case, guard, rule = problem.case, 0.01, ("long_tailed", True)
    if case.op == "weights":
        weight, threshold, grad = problem.weights[0], problem.thresholds[0], problem.grads[0]
        return {
            "pack": lambda: ours.masked_weight(weight, threshold, guard, case.mode.compute),
            "post": lambda: ours.masked_weight_backward(grad, weight, threshold, *rule),
        }
    x, weight, threshold = problem.input, problem.weight, problem.threshold
    grad, geometry, shape = problem.grad_output, (), ()
    parts = "", "_grad_input", "_grad_weight"
    forward, grad_input, grad_weight = (getattr(ours, f"masked_{case.op}{of}") for of in parts)
    if case.op == "conv":
        sides = ((number, number) for number in (case.stride, case.kernel // 2, 1))
        geometry, shape = (Geometry(*sides, case.groups),), (x.shape,)
    return {
        "forward": lambda: forward(x, weight, threshold, problem.bias, guard, *geometry),
        "grad_input": lambda: (grad_input(grad, *shape, weight, threshold, *geometry),),
        "grad_weight": lambda: grad_weight(grad, x, weight, threshold, *geometry, *rule),
    }


class Launches:
    """What a call launches (`runs`) and its `results`, in a tile or in that of the library.

    `chosen` is the library's tile, `tiles` are that and all others. All launches choose alike.
    """

    def __init__(self, call: Call, tile: Any = None) -> None:
        from dst_kernels.backends.triton.tuning import choosing

        self.chosen, self.tiles, self.runs = None, [], []

        def take(default: Any, candidates: Sequence[Any], run: Callable[[Any], object]) -> Any:
            self.chosen = self.chosen or default
            self.tiles = list(dict.fromkeys((*self.tiles, default, *candidates)))
            self.runs.append(run)
            return tile or default

        with choosing(take):
            self.results = call()


# -- compiling ahead: one kernel takes seconds, timing it a tenth of one ------------------------


def launches_on(device: str, case: Case, product: str, run: Callable, tile: Any = None) -> Launches:
    """Make a product's call with kernels that are given to `run` in place of `JITFunction.run`."""
    from triton.runtime.jit import JITFunction

    with case.mode.precision(), mock.patch.object(JITFunction, "run", run):
        return Launches(calls(problem_of(case, torch.device(device)))[product], tile)


def tasks_of(case: Case, product: str) -> Iterator[Task]:
    """Yield a product in every tile, by calls on meta tensors that launch nothing."""
    with contextlib.suppress(Exception):  # raised again, and recorded, where it is timed
        launches = launches_on("meta", case, product, lambda *_, **options: None)
        for tile in launches.tiles:
            yield Task(case, product, tile, tile == launches.chosen)


def compile_kernels(tasks: Sequence[Task], done: Any) -> None:
    """Leave the kernels in Triton's cache, with what launches them; count them in `done`."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self, *args, warmup, **options):
        kernel = launch(self, *args, warmup=True, **options)
        _ = kernel.run  # makes Triton build what launches the binary, and load both

    for task in tasks:
        with contextlib.suppress(Exception):  # raised again where it is timed
            launches_on("meta", task.case, task.product, compile_only, task.tile)
        done.value += 1


def compile_all(
    tasks: Sequence[Task], jobs: int, deadline: float, function: Callable = compile_kernels
) -> Iterator[Task]:
    """Compile tasks in some processes side by side; yield the tasks that kill their process."""
    spawn = multiprocessing.get_context("spawn")  # forked, it could not use this process's GPU
    waiting, running = [tasks[first::jobs] for first in range(jobs)], []
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for group in filter(None, waiting):
                done = spawn.Value("i", 0)
                process = spawn.Process(target=function, args=(group, done), daemon=True)
                process.start()
                running.append((process, group, done))
            ended = [entry for entry in running if not entry[0].is_alive()]
            running = [entry for entry in running if entry not in ended]
            died = [(group, done.value) for process, group, done in ended if process.exitcode]
            yield from (group[place] for group, place in died if place < len(group))
            waiting = [group[place + 1 :] for group, place in died]
            time.sleep(0.02)
    finally:
        for process, *_ in running:
            process.kill()
