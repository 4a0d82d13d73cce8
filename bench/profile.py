"""Lets Nsight Compute (ncu) say what bounds the kernels of ours furthest from their ceiling.

`python -m bench.profile CASE CONTENDER PASS` is what ncu runs: one call of one pass.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import Case, LayerCase, ModelCase, case_named
from .contenders import contenders_for, problem_of
from .contenders.work import flops, least_bytes
from .gpu import run_process
from .measure.run import choose
from .measurements import CEILING, COPY, GEMM, Measurements, duration
from .report.tables import markdown_table
from .results import UsageError, write_whole

# Named alike on GPUs of compute capability 8.0 to 10.0; shares are in percent of a peak. What
# differs among them, reasons for stalls and the launch, comes as sections.
_TIME, _PEAK = "gpu__time_duration.sum", ".avg.pct_of_peak_sustained_elapsed"
_SHARES = {
    "memory bandwidth (DRAM)": "gpu__dram_throughput" + _PEAK,
    "arithmetic (tensor pipe)": "sm__pipe_tensor_cycles_active" + _PEAK,
    "bandwidth of L2": "lts__throughput" + _PEAK,
    "instructions other than the tensor cores' own": "sm__throughput" + _PEAK,
}
_OTHERS = {
    "achieved occupancy, %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
    "registers a thread": "launch__registers_per_thread",
    "shared memory a block, B": "launch__shared_mem_per_block_dynamic",
}
_METRICS = ",".join([_TIME, *_SHARES.values(), _OTHERS["achieved occupancy, %"]])
_NCU = (
    "--clock-control none --profile-from-start off --csv --target-processes all --page raw "
    f"--print-units base --section LaunchStats --section WarpStateStats --metrics {_METRICS}"
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
_NEAR_PEAK = 80.0  # percent, as in Nsight Compute's own rules
_SMALL_GRID = 0.5  # waves: of what runs at once

# CONTENDER/PASS that are one kernel of ours; elsewhere vendors' products take most of the time.
_OURS = ("fused/forward", "fused/grad_input", "fused/grad_weight", "auto/pack", "auto/post")
_SHORTEST = 2e-6  # a ceiling below this is lost in what it takes to launch a kernel
_LONGEST = 150.0  # seconds for a kernel: torch starts, Triton compiles, ncu replays a dozen times


# A pass to profile: its measured seconds, and the least that the ceilings allow, if known.
Target = namedtuple("Target", "name seconds least")


def targets(found: Measurements, filters: Sequence[str] = ()) -> list[Target]:
    """Return what was timed, furthest from its ceiling first: our kernels, or all that fit filters.

    Raises UsageError without any.
    """
    named = {}
    for row in found.rows:
        case, what = found.cases.get(row.case), f"{row.provider}/{row.pass_}"
        if row.metric == "time" and case is not None and not isinstance(case, ModelCase):
            seconds = found.newest(row.case, row.provider, row.pass_, "graph_time") or row.figure
            one = Target(f"{row.case}/{what}", seconds, _least(found, case, row.pass_))
            if filters or (what in _OURS and (one.least or 0.0) >= _SHORTEST):
                named[one.name] = one
    if not named:
        raise UsageError(
            f"CSV has no time of a kernel of ours with its ceilings on {found.gpu}. Accepted: "
            "results of the suites linear, conv or streaming; or --filter for whatever was timed."
        )
    fitting = choose(named, filters).values()
    return sorted(fitting, key=lambda one: -one.seconds / (one.least or float("inf")))


def _least(found: Measurements, case: Case, pass_name: str) -> float | None:
    """Return the longer of FLOPs at the speed of a product and bytes at that of a copy."""
    speed = found.newest(GEMM, CEILING, "forward", "flops")
    bandwidth = found.newest(COPY, CEILING, "forward", "bandwidth")
    moving = bandwidth and least_bytes(case, pass_name) / bandwidth
    if not isinstance(case, LayerCase):
        return moving
    half = case.mode.compute.itemsize == 2  # the product's speed is bf16's
    return max(moving, flops(case, pass_name) / speed) if moving and half and speed else None


def profile_all(chosen: Sequence[Target], folder: Path, deadline: float) -> list[str]:
    """Profile each into FOLDER/profile.md, with what ncu printed in profile-*.csv; return failures.

    Clocks are left as they are, and caches are emptied before every kernel, as in the benchmark.
    Raises UsageError without ncu or a GPU.
    """
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        raise UsageError("ncu (Nsight Compute) or a CUDA device is missing. Accepted: both.")
    parts, failed = [f"# What bounds our kernels\n\n{torch.cuda.get_device_name()}."], []
    folder.mkdir(parents=True, exist_ok=True)
    for index, target in enumerate(chosen):
        table, log = (folder / f"profile-{index}.{kind}" for kind in ("csv", "txt"))
        command = [ncu, *_NCU.split(), "--log-file", str(table)]
        command += [sys.executable, "-m", "bench.profile", *target.name.split("/")]
        seconds = min(deadline - time.monotonic(), _LONGEST)
        code = run_process(command, log, seconds) if seconds > 1 else None
        launches = rows_of(table) if code == 0 and table.exists() else []
        how = "no time left" if code is None else f"exit code {code}, see {log.name}"
        failed += [] if launches else [f"{target.name}: {how}"]
        text = _section(target, launches) if launches else f"Not profiled: {how}."
        parts.append(f"## `{target.name}`\n\n{text}")
        write_whole(folder / "profile.md", "\n\n".join(parts) + "\n")
    return failed


def rows_of(page: Path) -> list[dict[str, str]]:
    """Return the launches on ncu's raw page, below messages, a header and a row of units."""
    text = page.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return list(csv.DictReader(lines))[1:]


def _figure(launch: dict[str, str], metric: str) -> float:
    try:
        return float(launch.get(metric, "n/a").replace(",", ""))
    except ValueError:
        return float("nan")


def _section(target: Target, launches: list[dict[str, str]]) -> str:
    """Show the longest kernel of the call in a table and a sentence."""
    times = [_figure(launch, _TIME) for launch in launches]
    launch, share = launches[times.index(max(times))], max(times) / sum(times)
    lines = {"kernel": f"`{launch['Kernel Name']}`", "measured": duration(target.seconds)}
    if target.least is not None:
        over = target.seconds / target.least
        lines["ceiling"] = f"{duration(target.least)} ({over:.2f} times)"
    lines["of the call's kernels"] = f"{share:.0%}"
    lines |= {f"{name}, %": f"{_figure(launch, one):.3g}" for name, one in _SHARES.items()}
    lines |= {name: f"{_figure(launch, one):.4g}" for name, one in _OTHERS.items()}
    return f"{markdown_table(['', 'figure'], lines.items())}\n\n{bound(launch)}"


def bound(launch: dict[str, str]) -> str:
    """Say what bounds a kernel: what is near its peak, too small a grid, or the longest wait."""
    for name, metric in _SHARES.items():
        if (share := _figure(launch, metric)) >= _NEAR_PEAK:
            return f"Bound by {name}: {share:.0f} % of its peak."
    if (waves := _figure(launch, _OTHERS["waves"])) < _SMALL_GRID:
        return f"Bound by its small grid: {waves:.0%} of the blocks that the GPU has room for."
    stalls = {found[1]: _figure(launch, m) for m in launch if (found := _STALL.fullmatch(m))}
    waits = {name: value for name, value in stalls.items() if "selected" not in name and value > 0}
    if not waits:
        return "Not known: ncu counted neither a resource near its peak nor reasons for stalls."
    longest = max(waits, key=waits.__getitem__)
    share = waits[longest] / sum(stalls.values())
    return f"Bound by latency: {share:.0%} of a warp's time goes into waiting ({longest})."


if __name__ == "__main__":
    # As the benchmark calls a pass: to warm up, then once while the profiler looks.
    case, (name, pass_name) = case_named(sys.argv[1]), sys.argv[2:]
    (contender,) = (one for one in contenders_for(case) if one.name == name)
    with case.mode.precision(tune=True):
        work = contender.make(problem_of(case, torch.device("cuda")))
        prepared = work.prepare(pass_name)
        with prepared.surroundings():
            for _ in range(3):  # the first calls compile, tune and make what backward needs
                prepared.call()
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                prepared.call()
                torch.cuda.synchronize()
