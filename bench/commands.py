"""The commands of `python -m bench`, as typer reads them."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .check import check_goals, choose_devices, choose_gpu, choose_predicted
from .display import Display
from .environment import CPU, ROOT, Environment, choose_device, is_predicted, slug
from .errors import UsageError
from .goal import MISSED, NOT_MEASURED
from .gpu import LOST, SANITIZER_TESTS, run_everything
from .machine import MACHINES, machine_named
from .measurements import by_gpu, only_gpu
from .plan import write_plan
from .predict import predict as write_predictions
from .profiling import one_target, profile_all, worst_targets
from .readme import has_markers, refresh
from .report import readme_table, write_report
from .results import ResultsFile, Run, read_all, read_results
from .runner import Outcome, already_measured, run_suite
from .suites import SUITES, suite_named
from .tile_rows import TilesFile, read_tiles
from .tune import TUNED_SUITES, Sweep, check_device, processors, tuned_cases
from .tune_report import write_tiles

__all__ = ["app"]

app = typer.Typer(
    help="Measure dst_kernels against dense layers and compiled and eager DST.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WRONG, USAGE = 1, 2
"""Exit codes: a provider is wrong, a goal missed or a part failed; unusable input."""

Device = Annotated[str | None, typer.Option(help="cuda or cpu; by default CUDA if there.")]
Minutes = Annotated[float | None, typer.Option(min=0.0, help="Begin nothing after these.")]

Commit = Annotated[
    str | None, typer.Option(help="What to record as the commit, for a copy without git.")
]
Csv = Annotated[list[Path], typer.Argument(help="One or more results.csv.")]
Gpu = Annotated[str | None, typer.Option(help="Part of the GPU's name, if there are several.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail also where one is not measured.")]


def _usage_errors(command: Callable) -> Callable:
    """Show unusable input as a message."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UsageError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(USAGE) from None

    return wrapper


@app.command()
@_usage_errors
def run(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")],
    out: Annotated[Path, typer.Option(help="Folder of results.csv, appended to.")],
    minutes: Minutes = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; may be repeated."),
    ] = None,
    device: Device = None,
    commit: Commit = None,
    compiled: Annotated[
        bool,
        typer.Option("--compiled/--no-compiled", help="Providers that go through torch.compile."),
    ] = True,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--again",
            help="Leave out what results.csv has of this device, versions and commit. "
            "By default, where the commit is known and nothing is changed since.",
        ),
    ] = None,
) -> None:
    """Measure a suite into OUT/results.csv; fails where a provider computes something wrong."""
    begin = time.monotonic()
    chosen, where = suite_named(suite), choose_device(device)
    environment = Environment.now(where, commit)
    with ResultsFile(out / "results.csv") as file, Display() as display:
        resume = environment.identifies_code if resume is None else resume
        rows = read_results(file.path) if resume else []
        outcome = run_suite(
            chosen,
            Run(file, environment),
            where,
            display,
            names=provider,
            compiled=compiled,
            deadline=begin + 60 * minutes if minutes is not None else float("inf"),
            done=already_measured(rows, chosen, environment),
        )
    _summarize(outcome, file.path)


def _summarize(outcome: Outcome, path: Path) -> None:
    print(f"{outcome.measured} measured (provider and case), in {path}")
    for title, by_case in (
        ("Left out, the time was up", outcome.left_out),
        ("WRONG, so without a time", outcome.wrong),
    ):
        if by_case:
            lines = [f"{case}: {', '.join(providers)}" for case, providers in by_case.items()]
            print(f"{title}:", *lines, sep="\n  ")
    if outcome.lost:
        print(f"The device faulted and the run ended there: {outcome.lost}", file=sys.stderr)
        raise typer.Exit(LOST)
    if outcome.wrong:
        raise typer.Exit(WRONG)


@app.command()
@_usage_errors
def report(
    csv: Csv,
    readme: Annotated[
        Path | None,
        typer.Option(
            help="Refresh the table in this file. By default the repository's README, where it "
            "has the markers and there are rows of a GPU."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of report.md and its plots; by default the CSV's.")
    ] = None,
) -> None:
    """Write Markdown tables and plots, and refresh the README's table."""
    rows = read_all(csv)
    if readme is not None and any(is_predicted(row.gpu) for row in rows):
        raise UsageError("CSV has predicted rows. Accepted with --readme: measured ones alone.")
    written = write_report(rows, out or csv[0].parent)
    if readme is not None:
        refresh(readme, readme_table(by_gpu(rows).values()))
        written.append(readme)
    else:
        ours, table = ROOT / "README.md", readme_table(by_gpu(only_gpu(rows)).values())
        if table and has_markers(ours):
            refresh(ours, table)
            written.append(ours)
    print(*written, sep="\n")


@app.command()
@_usage_errors
def check(
    csv: Csv,
    gpu: Gpu = None,
    strict: Strict = False,
    predicted: Annotated[
        Path | None, typer.Option(help="A results.csv of predictions, shown beside the figures.")
    ] = None,
) -> None:
    """Print each goal for the devices of CSV with its figure; fails where one is missed."""
    console = Console()
    expected = None if predicted is None else choose_predicted(read_all([predicted]))
    verdicts = {
        verdict
        for measurements in choose_devices(read_all(csv), gpu)
        for verdict in check_goals(
            measurements, console, None if measurements.gpu == CPU else expected
        ).values()
    }
    if MISSED in verdicts or (strict and NOT_MEASURED in verdicts):
        raise typer.Exit(WRONG)


@app.command()
@_usage_errors
def predict(
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(MACHINES)}.")],
    out: Annotated[Path, typer.Option(help="Folder of results.csv, written anew.")],
    goals_only: Annotated[
        bool, typer.Option("--goals-only", help="Leave out what no goal reads, which is most.")
    ] = False,
) -> None:
    """Write what a GPU is expected to measure, by arithmetic; needs no GPU."""
    print(write_predictions(machine_named(gpu), out, goals_only=goals_only))


@app.command()
@_usage_errors
def plan(
    csv: Csv,
    out: Annotated[Path, typer.Option(help="The JSON file, usually in dst_kernels/plan/tables.")],
    gpu: Gpu = None,
) -> None:
    """Write the planner's table for a GPU from what was measured on it."""
    measurements = choose_gpu(read_all(csv), gpu)
    if measurements is None:
        raise UsageError("CSV has rows of a CPU only. Accepted: results of a GPU.")
    print(f"{write_plan(measurements, out)} cases in {out}")


@app.command()
@_usage_errors
def profile(
    csv: Csv,
    gpu: Gpu = None,
    count: Annotated[int, typer.Option(min=1, help="Kernels, the worst first.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of profile.md and profile.csv; by default the CSV's."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin nothing after these.")] = 9.0,
    case: Annotated[str | None, typer.Option(help="This one, with --provider and --pass.")] = None,
    provider: Annotated[str | None, typer.Option(help="Of --case.")] = None,
    pass_name: Annotated[str | None, typer.Option("--pass", help="Of --case.")] = None,
) -> None:
    """Let Nsight Compute say what bounds our kernels furthest from their ceiling."""
    measurements = choose_gpu(read_all(csv), gpu)
    if measurements is None:
        raise UsageError("CSV has rows of a CPU only. Accepted: results of a GPU.")
    given = (case, provider, pass_name)
    if None not in given:
        targets = [one_target(measurements, *given)]
    elif given == (None, None, None):
        targets = worst_targets(measurements, count)
    else:
        raise UsageError(
            f"--case, --provider and --pass are {case!r}, {provider!r} and {pass_name!r}. "
            "Accepted: all three or none."
        )
    folder = out or csv[0].parent
    failed = profile_all(measurements, targets, folder, 60 * minutes)
    print(folder / "profile.md", folder / "profile.csv", sep="\n")
    if failed:
        print("Not profiled: " + "; ".join(failed), file=sys.stderr)
        raise typer.Exit(WRONG)


@app.command()
@_usage_errors
def gpu(
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything; bench/results/<device> by default.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="For all of it.")] = 9.0,
    device: Device = None,
    commit: Commit = None,
    skip_tests: Annotated[
        bool, typer.Option("--skip-tests", help="Leave all the time to the suites.")
    ] = False,
    sanitizer: Annotated[
        bool, typer.Option("--sanitizer", help="Run tests under compute-sanitizer as well.")
    ] = False,
    sanitizer_tests: Annotated[
        str, typer.Option(help="Which, as arguments of pytest.")
    ] = SANITIZER_TESTS,
) -> None:
    """Everything worth ten minutes of a GPU: environment, tests, suites by priority, report.

    Goes on after the failure of any part, and fails at the end if one did.
    """
    where = choose_device(device or "cuda")
    folder = out or ROOT / "bench" / "results" / slug(Environment.now(where).gpu)
    failed = run_everything(
        folder,
        where,
        60 * minutes,
        commit=commit,
        tests=not skip_tests,
        sanitizer=shlex.split(sanitizer_tests) if sanitizer else None,
    )
    if failed:
        print("Failed: " + "; ".join(failed), file=sys.stderr)
        raise typer.Exit(WRONG)


@app.command()
@_usage_errors
def tune(
    out: Annotated[Path, typer.Option(help="Folder of tiles.csv, appended to, and tiles.md.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated; by default {', '.join(TUNED_SUITES)}."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Only cases whose name contains this; may be repeated."),
    ] = None,
    minutes: Minutes = None,
    device: Device = None,
    commit: Commit = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile ahead; all by default.")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--again", help="As of `run`, of tiles.csv.")
    ] = None,
) -> None:
    """Time every tile that our fused products can run in, into OUT/tiles.csv and OUT/tiles.md."""
    begin = time.monotonic()
    where = choose_device(device)
    check_device(where)
    cases = tuned_cases(suite or TUNED_SUITES, where.type, case or ())
    environment = Environment.now(where, commit)
    with TilesFile(out / "tiles.csv") as file, Display() as display:
        resume = environment.identifies_code if resume is None else resume
        known = [row for row in read_tiles(file.path) if environment.made(row)] if resume else ()
        deadline = begin + 60 * minutes if minutes is not None else float("inf")
        sweep = Sweep(file, environment, where, display, deadline, known)
        if where.type == "cuda":
            sweep.compile_ahead(cases, jobs or processors())
        sweep.measure(cases)
    print(f"{sweep.timed} tiles timed, {sweep.without} without a time, in {file.path}")
    if sweep.left_out:
        print("Left out, the time was up:", *sweep.left_out, sep="\n  ")
    if read_tiles(file.path):
        write_tiles([file.path], out / "tiles.md")
    if sweep.lost:
        print(f"The device faulted and the sweep ended there: {sweep.lost}", file=sys.stderr)
        raise typer.Exit(LOST)


@app.command()
@_usage_errors
def tiles(
    csv: Annotated[list[Path], typer.Argument(help="One or more tiles.csv.")],
    out: Annotated[Path | None, typer.Option(help="By default tiles.md beside the first.")] = None,
) -> None:
    """Write Markdown of what `tune` found: how far the chosen tiles are from the fastest."""
    path = out or csv[0].parent / "tiles.md"
    write_tiles(csv, path)
    print(path)
