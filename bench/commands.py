"""The commands of `python -m bench`, as typer reads them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dst_kernels.training.device import select_device
from dst_kernels.training.errors import UsageError, require_one_of

from . import tune as tuning
from .crossover import write_crossovers
from .gpu import LOST, run_everything
from .measure.run import Outcome, already_measured, run_suite
from .measurements import by_device, only_gpu
from .plan import write_plan
from .profile import profile_all, targets
from .report import tables
from .report.goals import MISSED, NOT_MEASURED, check_goals
from .results import ROOT, Environment, ResultsFile, read_results
from .suites import SUITES

WRONG, USAGE = 1, 2  # exit codes: something is wrong, missed or failed; unusable input


def _device_of(name: str) -> torch.device:
    """Return the device of --device; raise UsageError unless figures can be taken there."""
    device = select_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} has no timers here. Accepted: auto, cpu or cuda.")
    return device


class _Commands(typer.core.TyperGroup):
    def invoke(self, context: typer.Context) -> object:
        """Show unusable input as a message."""
        try:
            return super().invoke(context)
        except UsageError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(USAGE) from None


_HELP = "Measure dst_kernels against dense layers and compiled and eager DST."
_OPTIONS = {"add_completion": False, "pretty_exceptions_enable": False, "no_args_is_help": True}
_PATTERN = "A regular expression in CASE/CONTENDER (tune: CASE/PRODUCT); of several all must match."
app = typer.Typer(cls=_Commands, help=_HELP, **_OPTIONS)

Csv = Annotated[list[Path], typer.Argument(help="One or more results.csv.")]
Gpu = Annotated[str | None, typer.Option(help="Part of the GPU's name, if there are several.")]
Out = Annotated[Path, typer.Option(help="Folder of the CSV, which is appended to.")]
Folder = Annotated[Path | None, typer.Option(help="By default the folder of the CSV.")]
Minutes = Annotated[float, typer.Option(min=0.0, help="Begin nothing after these.")]
Device = Annotated[str, typer.Option(help="cuda or cpu; by default CUDA if there.")]
Commit = Annotated[str | None, typer.Option(help="The commit, for a copy without git.")]
Again = Annotated[bool, typer.Option("--again", help="Repeat what the CSV has of this code.")]
Filter = Annotated[list[str], typer.Option(help=_PATTERN)]
Readme = Annotated[Path | None, typer.Option(help="What has the table; by default README.md.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail where one is unmeasured.")]
Table = Annotated[Path, typer.Option(help="The JSON file, in dst_kernels/plan/tables.")]


def _fail_if(happened: object, code: int, message: str = "") -> None:
    if happened:
        print(message, end="\n" * bool(message), file=sys.stderr)
        raise typer.Exit(code)


def _rows(path: Path) -> list:
    """Return the rows of a file of results, which may have none yet."""
    return read_results(path) if path.read_text(encoding="utf-8").count("\n") > 1 else []


def run(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")],
    out: Out = Path("runs/bench"),
    minutes: Minutes = float("inf"),
    filter: Filter = (),
    device: Device = "auto",
    commit: Commit = None,
    compiled: Annotated[bool, typer.Option(help="What goes through torch.compile.")] = True,
    again: Again = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure a suite into OUT/results.csv; fails where a contender computes something wrong."""
    deadline, where = time.monotonic() + 60 * minutes, _device_of(device)
    require_one_of("--suite", suite, SUITES)
    here = Environment.now(where, commit)
    with ResultsFile(out / "results.csv", here) as file:
        rows = [] if again else _rows(file.path)
        done = already_measured(rows, SUITES[suite], where.type, here)
        options = {"filters": filter, "compiled": compiled, "deadline": deadline, "done": done}
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            outcome = run_suite(SUITES[suite], file, where, **options)
    measured = [row for row in _rows(file.path) if row.date == here.date and row.suite == suite]
    if as_json:
        names = {name.rstrip("_"): name for name in ("case", "provider", "pass_", "metric", "unit")}
        figures = [{name: getattr(row, names[name]) for name in names} for row in measured]
        for figure, row in zip(figures, measured, strict=True):
            figure["value"] = row.value if row.figure is None else row.figure
        print(json.dumps({**vars(here), "figures": figures, **vars(outcome)}))
    else:
        _show(file.path, measured, outcome)
    _fail_if(outcome.lost, LOST, f"The device faulted and the run ended there: {outcome.lost}")
    _fail_if(outcome.wrong, WRONG)


def _show(path: Path, rows: list, outcome: Outcome) -> None:
    late, wrong = "Left out, the time was up", "WRONG, so without a time"
    for title, by_case in ((late, outcome.left_out), (wrong, outcome.wrong)):
        if by_case:
            lines = [f"{case}: {', '.join(names)}" for case, names in by_case.items()]
            print(f"{title}:", *lines, sep="\n  ")
    if rows:
        print(*tables.write_report(read_results(path), path.parent), sep="\n")
    print(f"{outcome.measured} measured (contender and case), in {path}")


def report(csv: Csv, out: Folder = None, readme: Readme = None) -> None:
    """Write tables and plots; where there are rows of a GPU, refresh the README's table."""
    devices = by_device(read_results(*csv)).values()
    written = tables.write_report(read_results(*csv), out or csv[0].parent)
    gpus = [found for found in devices if not found.on_cpu]
    if readme is not None or (gpus and out is None and tables.has_markers(tables.README)):
        written.append(readme or tables.README)
        text = "\n\n".join(map(tables.main_table, gpus or devices))
        tables.refresh_readme(written[-1], text)
    print(*written, sep="\n")


def check(csv: Csv, gpu: Gpu = None, strict: Strict = False) -> None:
    """Hold the figures against the goals; fails where one is missed."""
    rows = read_results(*csv)
    devices = by_device(rows).values() if gpu is None else [only_gpu(rows, gpu)]
    verdicts = {v for found in devices for v in check_goals(found, Console()).values()}
    _fail_if(MISSED in verdicts or (strict and NOT_MEASURED in verdicts), WRONG)


def plan(csv: Csv, out: Table, gpu: Gpu = None) -> None:
    """Write the planner's table for a GPU from what was measured on it."""
    table = write_plan(only_gpu(read_results(*csv), gpu), out)
    print(f"{len(table['cases'])} linear layers and {len(table['convs'])} convolutions in {out}")


def plan_cpu(
    out: Table = ROOT / "dst_kernels/plan/tables/cpu.json",
    threads: Annotated[int, typer.Option(min=1, help="Of the measured products.")] = 1,
    commit: Commit = None,
) -> None:
    """Measure below which share of kept weights kept rows win on this CPU; takes minutes."""
    torch.set_num_threads(threads)
    write_crossovers(out, Environment.now(torch.device("cpu"), commit), print)
    print(out)


def profile(
    csv: Csv,
    gpu: Gpu = None,
    count: Annotated[int, typer.Option(min=1, help="Kernels, the worst first.")] = 3,
    filter: Filter = (),
    out: Folder = None,
    minutes: Minutes = 9.0,
) -> None:
    """Let Nsight Compute say what bounds our kernels furthest from their ceiling."""
    deadline, folder = time.monotonic() + 60 * minutes, out or csv[0].parent
    found = only_gpu(read_results(*csv), gpu)
    failed = profile_all(targets(found, filter)[:count], folder, deadline)
    print(folder / "profile.md")
    _fail_if(failed, WRONG, "Not profiled: " + "; ".join(failed))


def tune(
    out: Out = Path("runs/bench"),
    minutes: Minutes = float("inf"),
    filter: Filter = (),
    device: Device = "auto",
    commit: Commit = None,
    again: Again = False,
) -> None:
    """Time every tile of our fused products; writes OUT/tiles.csv and OUT/tiles/report.md."""
    deadline, where = time.monotonic() + 60 * minutes, _device_of(device)
    here = Environment.now(where, commit)
    with ResultsFile(out / "tiles.csv", here) as file:
        known = [] if again else [row for row in _rows(file.path) if here.made(row)]
        lost = tuning.tune(file, where, filter, deadline, known)
    print(file.path, *tables.write_report(read_results(file.path), out / "tiles"), sep="\n")
    _fail_if(lost, LOST, f"The device faulted and the sweep ended there: {lost}")


def gpu(
    out: Annotated[Path | None, typer.Option(help="By default runs/bench-<device>.")] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="For all of it.")] = 9.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out.")] = "cuda",
    commit: Commit = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Even if tests fail.")] = False,
) -> None:
    """Nine minutes of a GPU: tests, figures, the planner's table; call it again to go on."""
    _fail_if(not run_everything(out, _device_of(device), minutes, commit, keep_going), WRONG)


for _command in (run, report, check, plan, plan_cpu, profile, tune, gpu):
    app.command()(_command)
