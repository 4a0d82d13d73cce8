"""Nsight Compute: its command line, and the table that it prints."""

from __future__ import annotations

import csv
import io
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .gpu import run_part

__all__ = [
    "DRAM",
    "L2",
    "OCCUPANCY",
    "REGISTERS",
    "SHARED_MEMORY",
    "SM",
    "TENSOR",
    "WAVES",
    "Launch",
    "NcuError",
    "find_ncu",
    "launches_in",
    "run_ncu",
]

# Named alike on GPUs of compute capability 8.0 to 10.0: an unknown name could cost all others.
# Shares of a peak are in percent. The active cycles of the tensor pipe are those of wgmma, too,
# which sm__ops_path_tensor_op_hmma_* leave out.
_TIME = "gpu__time_duration.sum"
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
_METRICS = (_TIME, SM, TENSOR, DRAM, L2, OCCUPANCY)

# What differs among GPUs comes as sections, from which ncu itself leaves out what a GPU has not:
# the reasons for stalls, and of a launch the following.
_SECTIONS = ("LaunchStats", "WarpStateStats")
REGISTERS = "launch__registers_per_thread"
WAVES = "launch__waves_per_multiprocessor"
SHARED_MEMORY = ("launch__shared_mem_per_block_static", "launch__shared_mem_per_block_dynamic")
# Some versions tell cycles without any issue apart once more.
_STALL = re.compile(
    r"smsp__average_warps_issue_stalled_(\w+)(?<!_not_issued)_per_issue_active\.ratio"
)
_NO_STALLS = ("selected", "not_selected")  # issued, or ready while another was issued

_NAME = "Kernel Name"
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


class NcuError(RuntimeError):
    """Nothing was profiled; the message says why."""


@dataclass(frozen=True)
class Launch:
    """A kernel's launch as ncu saw it.

    Args:
        name: of the kernel, as ncu shows it.
        figures: by metric, those that are numbers, in base units.
        seconds: it took; None where ncu does not say.
    """

    name: str
    figures: dict[str, float]
    seconds: float | None

    @property
    def stalls(self) -> list[tuple[str, float]]:
        """Reasons for which warps did not issue, and their shares of a warp's time, largest first.

        Without those that hardly ever were one.
        """
        cycles = {
            found[1]: value
            for name, value in self.figures.items()
            if (found := _STALL.fullmatch(name))
        }
        total = sum(cycles.values())
        shares = [
            (reason, value / total)
            for reason, value in cycles.items()
            if reason not in _NO_STALLS and value > 0
        ]
        return sorted(shares, key=lambda pair: -pair[1])


def find_ncu() -> str:
    """Raises UsageError where there is none."""
    found = shutil.which("ncu")
    if found is None:
        raise UsageError(
            "ncu (Nsight Compute) is not on the PATH. Accepted: a PATH with its folder, which is "
            "often bin/ of a CUDA toolkit."
        )
    return found


def run_ncu(ncu: str, command: Sequence[str], seconds: float) -> str:
    """What ncu prints of the kernels that `command` runs between cudaProfilerStart and Stop.

    Clocks are left as they are, as in the benchmark; caches are emptied before every kernel, as
    before the calls that it times. Raises NcuError after `seconds` and where ncu fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        table, output = Path(folder) / "table.csv", Path(folder) / "output.txt"
        options = ["--clock-control", "none", "--profile-from-start", "off"]
        options += ["--target-processes", "all", "--metrics", ",".join(_METRICS)]
        for section in _SECTIONS:
            options += ["--section", section]
        options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table)]
        problem = run_part([ncu, *options, *command], output, seconds, fresh=True)
        text = _read(table)
        if problem is not None:
            raise NcuError(f"{problem}{_reason(text, _read(output))}")
        if not launches_in(text):
            raise NcuError(f"no kernel was profiled{_reason(text, _read(output))}")
    return text


def launches_in(text: str) -> list[Launch]:
    """Of the raw page as CSV: messages, a header, a row of units, then a row for each launch."""
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    messages = ("==", "\n")
    table = [line for line in lines[start:] if not line.startswith(messages)]
    rows = list(csv.DictReader(io.StringIO("".join(table))))
    return [_launch(row, rows[0]) for row in rows[1:] if row.get(_NAME)]


def _launch(row: dict[str, str], units: dict[str, str]) -> Launch:
    figures = {}
    for name, text in row.items():
        # Neither a text nor n/a is a figure, and neither may cost the others.
        if text and re.fullmatch(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?", text, re.IGNORECASE):
            figures[name] = float(text.replace(",", ""))
    scale, count = _SECONDS.get(units.get(_TIME) or ""), figures.get(_TIME)
    seconds = None if scale is None or count is None else count * scale
    return Launch(row[_NAME], figures, seconds)


def _reason(*texts: str) -> str:
    """What ncu gave as one, in its own words, or the last line that there is."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("$ ")]  # the command itself
    errors = [line for line in lines if line.startswith("==ERROR==")]
    chosen = (errors or lines[-1:])[:1]
    return "".join(f": {line}" for line in chosen)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
