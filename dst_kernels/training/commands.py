"""Define the commands of `dst-kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from .config import ONLY_DST, RunConfig, not_of_rival, option
from .device import ACCEPTED
from .errors import UsageError
from .options import RUN, WHAT, SweepOptions, TrainOptions, opt, signature
from .presets import DATASET_PRESETS
from .processes import together
from .rules import check, integer
from .terminal import messages, new_console, usable_path

app = typer.Typer(
    name="dst-kernels",
    help="Dynamic sparse training: train a model that prunes itself, and compare runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ON_RESUME = ("epochs", "device", "fsdp")
_NOT_IN_SWEEPS = (
    *("preset", "dense", "compare", "method", "density", "alpha", "target", "seed", "out"),
    "resume",
)


@app.callback()
def _app() -> None:
    """Dynamic sparse training: train a model that prunes itself, and compare runs."""


def train(**options: Any) -> None:
    """Train a model that learns its own sparsity: a classifier, or a language model.

    Without options it trains LeNet-300-100 on scikit-learn's digits, on a CPU in under a minute.

    On several GPUs, or machines: torchrun --nproc-per-node N -m dst_kernels train ...
    """
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    with messages(), together():
        if "resume" in given:
            _resume(given)
        else:
            _start(given)


vars(train)["__signature__"] = signature(TrainOptions)
app.command()(train)


def sweep(**options: Any) -> None:
    """Train a recipe for several alphas, targets or methods, and seeds; show means and spreads.

    The same command goes on with a sweep that was stopped.
    """
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    with messages():
        from .sweep import sweep as run_sweep

        preset, seeds, jobs = (given.pop(name) for name in ("preset", "seeds", "jobs"))
        out = usable_path("--out", given.pop("out", f"runs/sweep-{preset}"))
        axes = _axes({name: given.pop(name, None) for name in _AXES}, seeds)
        check("--jobs", int(jobs) if jobs.isdecimal() else jobs, integer(1, 1024))
        download = given.pop("download", False)
        same = [f"--preset={preset}"]
        for name, value in given.items():
            same.append(option(name) if value is True else f"{option(name)}={value}")
        methods = axes.get("method", ["dst"])
        if "method_options" in given and len(methods) > 1:
            raise UsageError(
                f"--method-options with --methods {','.join(methods)}. Accepted: one method."
            )
        _refuse_ignored(given, methods)
        parsed = {name: _parsed(name, value) for name, value in given.items()}
        configure = partial(RunConfig.from_preset, preset, **parsed)
        run_sweep(configure, axes, same, out, int(jobs), new_console(), download)


vars(sweep)["__signature__"] = signature(SweepOptions, TrainOptions, without=_NOT_IN_SWEEPS)
app.command()(sweep)


_AXES = {"alphas": "alpha", "targets": "target", "methods": "method", "densities": "density"}


def _axes(given: dict[str, str | None], seeds: str) -> dict[str, list[Any]]:
    """Return the values of each axis, the seeds last, by the option of each run."""
    chosen = {name: text for name, text in given.items() if text is not None}
    alone = {"alphas", "targets"} & chosen.keys()
    if not chosen or (alone and len(chosen) > 1):
        found = ", ".join(f"--{name} is {text!r}" for name, text in (chosen or given).items())
        raise UsageError(
            f"{found}. Accepted: --alphas, or --targets, or --methods and --densities."
        )
    axes = {
        _AXES[name]: [RunConfig.parse(_AXES[name], part) for part in text.split(",")]
        for name, text in chosen.items()
    }
    if "density" in axes:
        axes = {"method": ["dst"], **axes}
    numbers: list[Any] = []
    for part in seeds.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise UsageError(f"--seeds is {seeds!r}. Accepted: integers such as 0-4 or 1,5.")
        numbers += range(int(first), int(last or first) + 1)
    axes["seed"] = numbers
    return {field: list(dict.fromkeys(values)) for field, values in axes.items()}


def _start(given: dict[str, Any]) -> None:
    """Train a new run from the options `given`."""
    compare, download = given.pop("compare", False), given.pop("download", False)
    out = usable_path("--out", given.pop("out")) if "out" in given else None
    if compare and given.get("dense"):
        raise UsageError(
            "--compare and --dense contradict each other: --compare trains the dense twin too. "
            "Accepted: one of them."
        )
    for name in ("target", "density"):
        if "alpha" in given and name in given and given.get("method", "dst") == "dst":
            raise UsageError(
                f"--alpha and {option(name)} contradict each other: {option(name)} steers alpha. "
                "Accepted: one."
            )
    _refuse_ignored(given, [given.get("method", "dst")])
    if "init" in given:
        usable_path("--init", given["init"])
    given = {name: _parsed(name, value) for name, value in given.items()}
    preset = given.pop("preset", None)
    if preset is None:
        preset = DATASET_PRESETS.get(given.get("dataset", "digits"), "digits")
    config = RunConfig.from_preset(preset, **given)

    from .start import compare as start_both
    from .start import start

    action = start_both if compare else start
    action(config, out, new_console(), download=download)


def _refuse_ignored(given: dict[str, Any], methods: Sequence[str]) -> None:
    """Raise UsageError for options of trained thresholds that one of the methods has not."""
    names = [name for name in ONLY_DST if name in given]
    others = [method for method in methods if method != "dst"]
    if names and others:
        raise not_of_rival(names, ", ".join(others))


def _resume(given: dict[str, Any]) -> None:
    """Continue the run in the folder `given["resume"]`."""
    directory = usable_path("--resume", given.pop("resume"))
    fixed = [option(name) for name in given if name not in _ON_RESUME]
    if fixed:
        raise UsageError(
            f"{', '.join(fixed)} cannot be given with --resume: the run in {directory} has its own "
            f"value. Accepted: {', '.join(map(option, _ON_RESUME))}."
        )
    given = {name: _parsed(name, value) for name, value in given.items()}

    from .resume import resume

    resume(directory, new_console(), **given)


@app.command()
def evaluate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE", help="Folder that train has written, or file that export has."
        ),
    ],
    data_dir: Annotated[
        str | None, opt("data_dir", WHAT, "Where the data set is now.", "that of the run")
    ] = None,
    device: Annotated[str | None, opt("device", RUN, ACCEPTED, "that of the run")] = None,
) -> None:
    """Evaluate a run, as it was after its last epoch, or an exported model on the test set."""
    given = {"data_dir": data_dir, "device": device}
    with messages():
        from .evaluate import evaluate as evaluate_run

        given = {name: _parsed(name, value) for name, value in given.items() if value is not None}
        evaluate_run(usable_path("DIR", path), new_console(), given)


@app.command()
def export(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of a finished run of train.")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="dense: weights with zeros. compact: smaller layers. csr: sparse layers. auto: "
            "compact, then sparse where that is faster. onnx: compact, as an ONNX file.",
            metavar="NAME",
        ),
    ] = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            help="File to write. [default: DIR/sparse.safetensors, or DIR/model.onnx]",
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Write a run's final model without its pruned weights, as one small file."""
    with messages():
        from .export import export as export_run

        file = None if out is None else usable_path("--out", out)
        export_run(usable_path("DIR", directory), format, file, new_console())


@app.command("bench-model")
def bench_model(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File that export has written.")],
    threads: Annotated[str, typer.Option(help="CPU threads.", metavar="INT")] = "1",
) -> None:
    """Time an exported model on this CPU beside the dense one and, if installed, onnxruntime."""
    with messages():
        from .latency import bench

        count = int(threads) if threads.isdecimal() else threads
        check("--threads", count, integer(1, 1024))
        bench(usable_path("FILE", file), int(threads), new_console())


@app.command()
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders that train has written.")
    ],
    plot: Annotated[
        str, typer.Option(help="Picture file to write.", metavar="PATH")
    ] = "report.png",
) -> None:
    """Compare runs in one table and one plot; average those that differ only in the seed."""
    with messages():
        from .report import report as compare_runs

        paths = [usable_path("DIR", directory) for directory in directories]
        compare_runs(paths, usable_path("--plot", plot), new_console())


def _parsed(name: str, value: Any) -> Any:
    return RunConfig.parse(name, value) if isinstance(value, str) else value
