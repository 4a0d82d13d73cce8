"""Define the commands of `dst-kernels` and their options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from typing import Annotated, Any, get_type_hints

import typer

from .config import DATASET_PRESETS, PRESETS, RULES, RunConfig, option
from .errors import UsageError
from .processes import together
from .rules import FLAG, check, integer
from .terminal import messages, new_console, usable_path

app = typer.Typer(
    name="dst-kernels",
    help="Dynamic sparse training: train a model that prunes itself, and compare runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunConfig)}
_ON_RESUME = ("epochs", "device", "fsdp")
_PATHS = ("out", "resume", "init")


def _opt(name: str, panel: str, help: str, default: str | None = None) -> Any:
    """Return a typer option, which is None (or False) if not given: then the preset decides."""
    if default is None and _DEFAULTS.get(name) not in (None, False, ()):
        default = str(_DEFAULTS[name])
    # Numbers are read as text, so that our own error says what was given and what is accepted.
    metavar = "PATH" if name in _PATHS else None
    if name in RULES and RULES[name] is not FLAG:
        metavar = RULES[name].metavar
    return typer.Option(
        option(name),
        help=help,
        rich_help_panel=panel,
        show_default=default or False,
        metavar=metavar,
    )


_WHAT, _SPARSITY, _RECIPE, _RUN = "What to train", "Sparsity", "Recipe", "Run"
_PRESET_HELP = "A recipe to start from. " + " ".join(
    f"{name}: {preset.description}." for name, preset in PRESETS.items()
)


@app.callback()
def _app() -> None:
    """Dynamic sparse training: train a model that prunes itself, and compare runs."""


class _TrainOptions:
    """Hold the options of `train`: their types, help texts and defaults."""

    preset: Annotated[str | None, _opt("preset", _WHAT, _PRESET_HELP)] = None
    model: Annotated[
        str | None,
        _opt(
            "model",
            _WHAT,
            "The paper's: lenet-300-100, lenet-5, lstm-a, lstm-b, vgg-16, wrn-16-8, wrn-16-10, "
            "wrn-28-8, resnet-50; a torchvision classifier (resnet18, ...); for text gpt-mini.",
        ),
    ] = None
    dataset: Annotated[
        str | None,
        _opt(
            "dataset",
            _WHAT,
            f"{', '.join(DATASET_PRESETS)}. Without --preset, it also chooses the preset.",
        ),
    ] = None
    data_dir: Annotated[
        str | None,
        _opt(
            "data_dir",
            _WHAT,
            "Folder with torchvision's data sets or, for image-folder and CIFAR, with images: "
            "train/<class>/ and test/<class>/ (or val/<class>/). Of text: the file, in UTF-8; its "
            "last 10 % are the test set. Not used by digits.",
        ),
    ] = None
    download: Annotated[
        bool, _opt("download", _WHAT, "Download the data set into --data-dir if it is missing.")
    ] = False
    image_size: Annotated[
        str | None,
        _opt("image_size", _WHAT, "Height and width (pixels) to which a folder's images are cut."),
    ] = None
    validation: Annotated[
        str | None,
        _opt(
            "validation",
            _WHAT,
            "Hold out this share of the training set, chosen by --seed within each class (of a "
            "text: its end), and measure it after each epoch. The weights of the epoch with the "
            "lowest loss there are kept too, in best.safetensors.",
        ),
    ] = None
    init: Annotated[
        str | None,
        _opt(
            "init",
            _WHAT,
            "Start from the weights in this file, the state dict of the dense model or of a masked "
            "one, also of the method's authors: .safetensors, or written by torch.save.",
        ),
    ] = None
    dense: Annotated[
        bool, _opt("dense", _WHAT, "Train the dense twin: same initial weights and data, no masks.")
    ] = False
    compare: Annotated[
        bool, _opt("compare", _WHAT, "Train the dense twin, then the sparse model; compare both.")
    ] = False
    alpha: Annotated[
        str | None,
        _opt("alpha", _SPARSITY, "Factor of the regulariser sum(exp(-t)): larger is sparser."),
    ] = None
    alpha_schedule: Annotated[
        str | None,
        _opt(
            "alpha_schedule",
            _SPARSITY,
            "How alpha changes with the epochs after the warm-up: constant; linear, which rises "
            "to it; cosine, which falls from it to 0.",
        ),
    ] = None
    target: Annotated[
        str | None,
        _opt(
            "target",
            _SPARSITY,
            "The share of the masked weights to keep, in place of --alpha, which is then steered. "
            "Masks are fixed when it is reached, and the weights train on.",
        ),
    ] = None
    ramp_epochs: Annotated[
        str | None,
        _opt(
            "ramp_epochs",
            _SPARSITY,
            "Epochs, after those of the warm-up, in which --target is reached.",
            "three quarters",
        ),
    ] = None
    warmup_epochs: Annotated[
        str | None,
        _opt("warmup_epochs", _SPARSITY, "Train this many epochs before thresholds begin to move."),
    ] = None
    freeze_epoch: Annotated[
        str | None,
        _opt(
            "freeze_epoch",
            _SPARSITY,
            "Fix the masks at the end of this epoch; the weights that are kept train on.",
        ),
    ] = None
    granularity: Annotated[
        str | None, _opt("granularity", _SPARSITY, "One threshold per row, layer or element.")
    ] = None
    surrogate: Annotated[
        str | None,
        _opt(
            "surrogate",
            _SPARSITY,
            "Surrogate derivative of the mask's step function: "
            "long_tailed, rectangular, triangular or straight_through.",
        ),
    ] = None
    reset_ratio: Annotated[
        str | None,
        _opt(
            "reset_ratio",
            _SPARSITY,
            "A layer that keeps at most this share of its weights restarts from thresholds of 0; "
            "none: never.",
        ),
    ] = None
    threshold_lr: Annotated[
        str | None,
        _opt("threshold_lr", _SPARSITY, "Learning rate of the thresholds.", "that of the weights"),
    ] = None
    threshold_weight_decay: Annotated[
        str | None,
        _opt(
            "threshold_weight_decay",
            _SPARSITY,
            "Weight decay of the thresholds, which limits their size. "
            "The method's authors used 1e-4 in their CIFAR runs.",
        ),
    ] = None
    skip_first: Annotated[bool, _opt("skip_first", _SPARSITY, "Leave the first layer dense.")] = (
        False
    )
    skip_last: Annotated[bool, _opt("skip_last", _SPARSITY, "Leave the last layer dense.")] = False
    epochs: Annotated[str | None, _opt("epochs", _RECIPE, "Passes over the training set.")] = None
    batch_size: Annotated[
        str | None,
        _opt(
            "batch_size",
            _RECIPE,
            "Images, or windows of 128 characters, per step, of all processes together.",
        ),
    ] = None
    accumulate: Annotated[
        str | None,
        _opt(
            "accumulate",
            _RECIPE,
            "Run each batch in this many parts, one step for all: less memory, and without batch "
            "normalisation the same result up to rounding.",
        ),
    ] = None
    optimizer: Annotated[str | None, _opt("optimizer", _RECIPE, "sgd, adam or adamw.")] = None
    lr: Annotated[str | None, _opt("lr", _RECIPE, "Learning rate.")] = None
    momentum: Annotated[str | None, _opt("momentum", _RECIPE, "Momentum of sgd.")] = None
    weight_decay: Annotated[
        str | None,
        _opt("weight_decay", _RECIPE, "Weight decay of all parameters but the thresholds."),
    ] = None
    clip_grad_norm: Annotated[
        str | None,
        _opt(
            "clip_grad_norm",
            _RECIPE,
            "Scale the gradients of each step, with the regulariser's, to at most this norm.",
        ),
    ] = None
    milestones: Annotated[
        str | None,
        _opt("milestones", _RECIPE, "Epochs after which both learning rates drop: 80,120."),
    ] = None
    gamma: Annotated[
        str | None, _opt("gamma", _RECIPE, "Factor for the learning rates at each milestone.")
    ] = None
    out: Annotated[
        str | None,
        _opt("out", _RUN, "Folder to write, new or empty.", "runs/<preset>-<time>"),
    ] = None
    resume: Annotated[
        str | None,
        _opt(
            "resume",
            _RUN,
            "Continue the run in this folder as if it had never stopped. All other options "
            "keep the run's values; only --epochs, --device and --fsdp may be given.",
        ),
    ] = None
    seed: Annotated[
        str | None,
        _opt("seed", _RUN, "Seed of weights and data order; on a CPU equal seeds give equal runs."),
    ] = None
    device: Annotated[str | None, _opt("device", _RUN, "auto, cpu, cuda or cuda:N.")] = None
    amp: Annotated[
        str | None, _opt("amp", _RUN, "Mixed precision: none, or bf16 for bfloat16 products.")
    ] = None
    layer_by_layer: Annotated[
        bool,
        _opt(
            "layer_by_layer",
            _RUN,
            "Mask each weight in its layer's forward, with torch's optimizer. The default is the "
            "fastest way with the same result up to rounding: all in the optimizer's step.",
        ),
    ] = False
    compile: Annotated[
        bool, _opt("compile", _RUN, "Run the model through torch.compile; the first step is slow.")
    ] = False
    graph: Annotated[
        bool,
        _opt(
            "graph",
            _RUN,
            "On a GPU, replay whole steps as one CUDA graph: faster where kernels are small. For "
            "one process, and batches in one part.",
        ),
    ] = False
    fsdp: Annotated[
        bool,
        _opt(
            "fsdp",
            _RUN,
            "Of several processes, let each keep only a part of weights and optimizer (FSDP2). "
            "The default is a copy for each (DDP).",
        ),
    ] = False
    workers: Annotated[
        str | None, _opt("workers", _RUN, "Number of processes that read an image folder.")
    ] = None
    threads: Annotated[
        str | None,
        _opt(
            "threads",
            _RUN,
            "CPU threads; 0: torch's choice. Their number changes how sums are rounded, so one "
            "thread gives equal runs on any number of cores; more do not speed up small models.",
        ),
    ] = None
    track: Annotated[
        str | None,
        _opt(
            "track",
            _RUN,
            "tensorboard: write each epoch's figures and histograms of the thresholds into the "
            "run's folder, for tensorboard --logdir. none: do not.",
        ),
    ] = None


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


def _signature(*sources: type, without: Collection[str] = ()) -> inspect.Signature:
    """Return the signature that typer reads options from; the first source has its way."""
    keyword, found = inspect.Parameter.KEYWORD_ONLY, {}
    for source in sources:
        for name, hint in get_type_hints(source, include_extras=True).items():
            if source is sources[0] or name not in without:
                default = getattr(source, name, inspect.Parameter.empty)
                found[name] = inspect.Parameter(name, keyword, default=default, annotation=hint)
    return inspect.Signature(list(found.values()))


vars(train)["__signature__"] = _signature(_TrainOptions)
app.command()(train)


_NOT_IN_SWEEPS = ("preset", "dense", "compare", "alpha", "target", "seed", "out", "resume")


class _SweepOptions:
    """Hold the options of `sweep` that `train` has not."""

    preset: Annotated[str, typer.Argument(metavar="PRESET", help="The recipe of all runs.")]
    alphas: Annotated[
        str | None, typer.Option(help="Values of alpha: 1e-4,5e-4.", metavar="NUMBER,...")
    ] = None
    targets: Annotated[
        str | None,
        typer.Option(
            help="In place of alphas, values of --target: 0.1,0.05.", metavar="NUMBER,..."
        ),
    ] = None
    seeds: Annotated[
        str, typer.Option(help="Seeds: 0-4, or 1,5.", metavar="INT,... or INT-INT")
    ] = "0"
    jobs: Annotated[str, typer.Option(help="Runs at a time.", metavar="INT")] = "1"
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for all runs; what is in it is kept and gone on with. "
            "[default: runs/sweep-PRESET]",
            metavar="PATH",
        ),
    ] = None


def sweep(**options: Any) -> None:
    """Train a recipe for several alphas, or targets, and seeds; show means and spreads.

    The same command goes on with a sweep that was stopped.
    """
    given = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    with messages():
        from .sweep import sweep as run_sweep

        preset, seeds, jobs = (given.pop(name) for name in ("preset", "seeds", "jobs"))
        out = usable_path("--out", given.pop("out", f"runs/sweep-{preset}"))
        axes = _axes(given.pop("alphas", None), given.pop("targets", None), seeds)
        check("--jobs", int(jobs) if jobs.isdecimal() else jobs, integer(1, 1024))
        download = given.pop("download", False)
        same = [f"--preset={preset}"]
        for name, value in given.items():
            same.append(option(name) if value is True else f"{option(name)}={value}")
        parsed = {name: _parsed(name, value) for name, value in given.items()}
        first = {field: values[0] for field, values in axes.items()}
        base = RunConfig.from_preset(preset, **parsed, **first)
        run_sweep(base, axes, same, out, int(jobs), new_console(), download)


vars(sweep)["__signature__"] = _signature(_SweepOptions, _TrainOptions, without=_NOT_IN_SWEEPS)
app.command()(sweep)


def _axes(alphas: str | None, targets: str | None, seeds: str) -> dict[str, list[Any]]:
    """Return the values of --alphas or --targets, and of --seeds, by the option of each run."""
    if (alphas is None) == (targets is None):
        raise UsageError(f"--alphas is {alphas!r}, --targets {targets!r}. Accepted: one of them.")
    field, text = ("alpha", alphas) if targets is None else ("target", targets)
    values = [RunConfig.parse(field, part) for part in str(text).split(",")]
    numbers: list[int] = []
    for part in seeds.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise UsageError(f"--seeds is {seeds!r}. Accepted: integers such as 0-4 or 1,5.")
        numbers += range(int(first), int(last or first) + 1)
    return {field: list(dict.fromkeys(values)), "seed": list(dict.fromkeys(numbers))}


def _start(given: dict[str, Any]) -> None:
    """Train a new run from the options `given`."""
    compare, download = given.pop("compare", False), given.pop("download", False)
    out = usable_path("--out", given.pop("out")) if "out" in given else None
    if compare and given.get("dense"):
        raise UsageError(
            "--compare and --dense contradict each other: --compare trains the dense twin too. "
            "Accepted: one of them."
        )
    if "alpha" in given and "target" in given:
        raise UsageError(
            "--alpha and --target contradict each other: --target steers alpha. Accepted: one."
        )
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
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder that train has written.")],
    data_dir: Annotated[
        str | None, _opt("data_dir", _WHAT, "Where the data set is now.", "that of the run")
    ] = None,
    device: Annotated[
        str | None, _opt("device", _RUN, "auto, cpu, cuda or cuda:N.", "that of the run")
    ] = None,
) -> None:
    """Evaluate a run on its test set, as it was after its last epoch."""
    given = {"data_dir": data_dir, "device": device}
    with messages():
        from .evaluate import evaluate as evaluate_run

        given = {name: _parsed(name, value) for name, value in given.items() if value is not None}
        evaluate_run(usable_path("DIR", directory), new_console(), given)


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
