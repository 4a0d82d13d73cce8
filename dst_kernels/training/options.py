"""Declare the options of `dst-kernels train` and `sweep`: types, help texts, defaults."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from typing import Annotated, Any, get_type_hints

import typer

from .config import RULES, RunConfig, option
from .device import ACCEPTED
from .presets import DATASET_PRESETS, PRESETS
from .rivals import RIVALS
from .rules import FLAG

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunConfig)}
_PATHS = ("out", "resume", "init")


def opt(name: str, panel: str, help: str, default: str | None = None) -> Any:
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


WHAT, SPARSITY, RECIPE, RUN = "What to train", "Sparsity", "Recipe", "Run"
_PRESET_HELP = "A recipe to start from. " + " ".join(
    f"{name}: {preset.description}." for name, preset in PRESETS.items()
)


class TrainOptions:
    """Hold the options of `train`: their types, help texts and defaults."""

    preset: Annotated[str | None, opt("preset", WHAT, _PRESET_HELP)] = None
    model: Annotated[
        str | None,
        opt(
            "model",
            WHAT,
            "The paper's: lenet-300-100, lenet-5, lstm-a, lstm-b, vgg-16, wrn-16-8, wrn-16-10, "
            "wrn-28-8, resnet-50; a torchvision classifier (resnet18, ...); for text gpt-mini.",
        ),
    ] = None
    dataset: Annotated[
        str | None,
        opt(
            "dataset",
            WHAT,
            f"{', '.join(DATASET_PRESETS)}. Without --preset, it also chooses the preset.",
        ),
    ] = None
    data_dir: Annotated[
        str | None,
        opt(
            "data_dir",
            WHAT,
            "Folder with torchvision's data sets or, for image-folder and CIFAR, with images: "
            "train/<class>/ and test/<class>/ (or val/<class>/). Of text: the file, in UTF-8; its "
            "last 10 % are the test set. Not used by digits.",
        ),
    ] = None
    download: Annotated[
        bool, opt("download", WHAT, "Download the data set into --data-dir if it is missing.")
    ] = False
    image_size: Annotated[
        str | None,
        opt("image_size", WHAT, "Height and width (pixels) to which a folder's images are cut."),
    ] = None
    validation: Annotated[
        str | None,
        opt(
            "validation",
            WHAT,
            "Hold out this share of the training set, chosen by --seed within each class (of a "
            "text: its end), and measure it after each epoch. The weights of the epoch with the "
            "lowest loss there are kept too, in best.safetensors.",
        ),
    ] = None
    init: Annotated[
        str | None,
        opt(
            "init",
            WHAT,
            "Start from the weights in this file, the state dict of the dense model or of a masked "
            "one, also of the method's authors: .safetensors, or written by torch.save.",
        ),
    ] = None
    dense: Annotated[
        bool, opt("dense", WHAT, "Train the dense twin: same initial weights and data, no masks.")
    ] = False
    compare: Annotated[
        bool, opt("compare", WHAT, "Train the dense twin, then the sparse model; compare both.")
    ] = False
    method: Annotated[
        str | None,
        opt(
            "method",
            SPARSITY,
            "How masks are chosen. dst: by thresholds that train. To compare with: "
            f"{', '.join(RIVALS)}. These have none of the options for thresholds.",
        ),
    ] = None
    density: Annotated[
        str | None,
        opt(
            "density",
            SPARSITY,
            "The share of the masked weights that --method keeps; of dst the same as --target.",
        ),
    ] = None
    method_options: Annotated[
        str | None,
        opt(
            "method_options",
            SPARSITY,
            "Options of --method, the arguments of its class in dst_kernels.methods: "
            "every=938,rate=0.5. Where they have no default, every is an epoch.",
        ),
    ] = None
    method_epochs: Annotated[
        str | None,
        opt("method_epochs", SPARSITY, "Epochs in which --method's schedule runs.", "all"),
    ] = None
    alpha: Annotated[
        str | None,
        opt("alpha", SPARSITY, "Factor of the regulariser sum(exp(-t)): larger is sparser."),
    ] = None
    alpha_schedule: Annotated[
        str | None,
        opt(
            "alpha_schedule",
            SPARSITY,
            "How alpha changes with the epochs after the warm-up: constant; linear, which rises "
            "to it; cosine, which falls from it to 0.",
        ),
    ] = None
    target: Annotated[
        str | None,
        opt(
            "target",
            SPARSITY,
            "The share of the masked weights to keep, in place of --alpha, which is then steered. "
            "Masks are fixed when it is reached, and the weights train on.",
        ),
    ] = None
    ramp_epochs: Annotated[
        str | None,
        opt(
            "ramp_epochs",
            SPARSITY,
            "Epochs, after those of the warm-up, in which --target is reached.",
            "three quarters",
        ),
    ] = None
    warmup_epochs: Annotated[
        str | None,
        opt("warmup_epochs", SPARSITY, "Train this many epochs before thresholds begin to move."),
    ] = None
    freeze_epoch: Annotated[
        str | None,
        opt(
            "freeze_epoch",
            SPARSITY,
            "Fix the masks at the end of this epoch; the weights that are kept train on.",
        ),
    ] = None
    granularity: Annotated[
        str | None, opt("granularity", SPARSITY, "One threshold per row, layer or element.")
    ] = None
    surrogate: Annotated[
        str | None,
        opt(
            "surrogate",
            SPARSITY,
            "Surrogate derivative of the mask's step function: "
            "long_tailed, rectangular, triangular or straight_through.",
        ),
    ] = None
    reset_ratio: Annotated[
        str | None,
        opt(
            "reset_ratio",
            SPARSITY,
            "A layer that keeps at most this share of its weights restarts from thresholds of 0; "
            "none: never.",
        ),
    ] = None
    restore_collapsed: Annotated[
        bool,
        opt(
            "restore_collapsed",
            SPARSITY,
            "Put such a layer back to its last healthy thresholds instead. Not the paper's rule.",
        ),
    ] = False
    threshold_lr: Annotated[
        str | None,
        opt("threshold_lr", SPARSITY, "Learning rate of the thresholds.", "that of the weights"),
    ] = None
    threshold_weight_decay: Annotated[
        str | None,
        opt(
            "threshold_weight_decay",
            SPARSITY,
            "Weight decay of the thresholds, which limits their size. "
            "The method's authors used 1e-4 in their CIFAR runs.",
        ),
    ] = None
    skip_first: Annotated[bool, opt("skip_first", SPARSITY, "Leave the first layer dense.")] = False
    skip_last: Annotated[bool, opt("skip_last", SPARSITY, "Leave the last layer dense.")] = False
    epochs: Annotated[str | None, opt("epochs", RECIPE, "Passes over the training set.")] = None
    batch_size: Annotated[
        str | None,
        opt(
            "batch_size",
            RECIPE,
            "Images, or windows of 128 characters, per step, of all processes together.",
        ),
    ] = None
    accumulate: Annotated[
        str | None,
        opt(
            "accumulate",
            RECIPE,
            "Run each batch in this many parts, one step for all: less memory, and without batch "
            "normalisation the same result up to rounding.",
        ),
    ] = None
    optimizer: Annotated[str | None, opt("optimizer", RECIPE, "sgd, adam or adamw.")] = None
    lr: Annotated[str | None, opt("lr", RECIPE, "Learning rate.")] = None
    momentum: Annotated[str | None, opt("momentum", RECIPE, "Momentum of sgd.")] = None
    weight_decay: Annotated[
        str | None,
        opt("weight_decay", RECIPE, "Weight decay of all parameters but the thresholds."),
    ] = None
    clip_grad_norm: Annotated[
        str | None,
        opt(
            "clip_grad_norm",
            RECIPE,
            "Scale the gradients of each step, with the regulariser's, to at most this norm.",
        ),
    ] = None
    milestones: Annotated[
        str | None,
        opt("milestones", RECIPE, "Epochs after which both learning rates drop: 80,120."),
    ] = None
    gamma: Annotated[
        str | None, opt("gamma", RECIPE, "Factor for the learning rates at each milestone.")
    ] = None
    out: Annotated[
        str | None,
        opt("out", RUN, "Folder to write, new or empty.", "runs/<preset>-<time>"),
    ] = None
    resume: Annotated[
        str | None,
        opt(
            "resume",
            RUN,
            "Continue the run in this folder as if it had never stopped. All other options "
            "keep the run's values; only --epochs, --device and --fsdp may be given.",
        ),
    ] = None
    seed: Annotated[
        str | None,
        opt("seed", RUN, "Seed of weights and data order; on a CPU equal seeds give equal runs."),
    ] = None
    device: Annotated[str | None, opt("device", RUN, ACCEPTED)] = None
    amp: Annotated[
        str | None, opt("amp", RUN, "Mixed precision: none, or bf16 for bfloat16 products.")
    ] = None
    layer_by_layer: Annotated[
        bool,
        opt(
            "layer_by_layer",
            RUN,
            "Mask each weight in its layer's forward, with torch's optimizer. The default is the "
            "fastest way with the same result up to rounding: all in the optimizer's step.",
        ),
    ] = False
    compile: Annotated[
        bool, opt("compile", RUN, "Run the model through torch.compile; the first step is slow.")
    ] = False
    graph: Annotated[
        bool,
        opt(
            "graph",
            RUN,
            "On a GPU, replay whole steps as one CUDA graph: faster where kernels are small. For "
            "one process, and batches in one part.",
        ),
    ] = False
    fsdp: Annotated[
        bool,
        opt(
            "fsdp",
            RUN,
            "Of several processes, let each keep only a part of weights and optimizer (FSDP2). "
            "The default is a copy for each (DDP).",
        ),
    ] = False
    workers: Annotated[
        str | None, opt("workers", RUN, "Number of processes that read an image folder.")
    ] = None
    threads: Annotated[
        str | None,
        opt(
            "threads",
            RUN,
            "CPU threads; 0: torch's choice. Their number changes how sums are rounded, so one "
            "thread gives equal runs on any number of cores; more do not speed up small models.",
        ),
    ] = None
    track: Annotated[
        str | None,
        opt(
            "track",
            RUN,
            "tensorboard: write each epoch's figures and histograms of the thresholds into the "
            "run's folder, for tensorboard --logdir. none: do not.",
        ),
    ] = None


class SweepOptions:
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
    methods: Annotated[
        str | None,
        typer.Option(
            help="In place of alphas, values of --method: dst,set,rigl.", metavar="NAME,..."
        ),
    ] = None
    densities: Annotated[
        str | None,
        typer.Option(help="Values of --density for all methods: 0.1,0.05.", metavar="NUMBER,..."),
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


def signature(*sources: type, without: Collection[str] = ()) -> inspect.Signature:
    """Return the signature that typer reads options from; the first source has its way."""
    keyword, found = inspect.Parameter.KEYWORD_ONLY, {}
    for source in sources:
        for name, hint in get_type_hints(source, include_extras=True).items():
            if source is sources[0] or name not in without:
                default = getattr(source, name, inspect.Parameter.empty)
                found[name] = inspect.Parameter(name, keyword, default=default, annotation=hint)
    return inspect.Signature(list(found.values()))
