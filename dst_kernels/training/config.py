"""Define a run's configuration: all options that shape its result, and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, require_one_of
from .presets import DATASET_PRESETS, PRESETS
from .rivals import METHODS, check_method
from .rules import FLAG, MILESTONES, MOST, PAIRS, TEXT, check, integer, number, or_none
from .tasks import LANGUAGE, Task, task_of

ALPHA_SCHEDULES = ("constant", "linear", "cosine")
_LANGUAGE_MODEL = "gpt-mini"
_RAMP = 0.75  # share of the epochs, after those of the warm-up, in which --target is reached


@dataclass(frozen=True)
class RunConfig:
    """Describe one training run; invalid values raise UsageError.

    The defaults are the `digits` preset. `dst-kernels train --help` explains each field.
    """

    preset: str = "digits"
    model: str = "lenet-300-100"
    dataset: str = "digits"
    data_dir: str = "data"
    image_size: int = 224
    validation: float | None = None
    init: str | None = None
    dense: bool = False
    method: str = "dst"
    density: float | None = None
    method_options: str | None = None
    method_epochs: int | None = None
    alpha: float = 4e-3
    alpha_schedule: str = "constant"
    target: float | None = None
    ramp_epochs: int | None = None
    warmup_epochs: int = 0
    freeze_epoch: int | None = None
    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_grad_norm: float | None = None
    threshold_lr: float | None = None
    threshold_weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    granularity: str = "row"
    surrogate: str = "long_tailed"
    reset_ratio: float | None = 0.01
    restore_collapsed: bool = False
    skip_first: bool = False
    skip_last: bool = False
    seed: int = 0
    device: str = "auto"
    amp: str = "none"
    layer_by_layer: bool = False
    compile: bool = False
    graph: bool = False
    fsdp: bool = False
    workers: int = 0
    threads: int = 1
    track: str = "none"

    def __post_init__(self) -> None:
        from dst_kernels.nn import GRANULARITIES
        from dst_kernels.reference import SURROGATES

        require_one_of("--preset", self.preset, PRESETS)
        require_one_of("--dataset", self.dataset, DATASET_PRESETS)
        require_one_of("--method", self.method, METHODS)
        require_one_of("--optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        require_one_of("--granularity", self.granularity, GRANULARITIES)
        require_one_of("--surrogate", self.surrogate, SURROGATES)
        require_one_of("--alpha-schedule", self.alpha_schedule, ALPHA_SCHEDULES)
        require_one_of("--amp", self.amp, ("none", "bf16"))
        require_one_of("--track", self.track, ("none", "tensorboard"))
        for name, rule in RULES.items():
            check(option(name), getattr(self, name), rule)
        if (self.task is LANGUAGE) != (self.model == _LANGUAGE_MODEL):
            models = _LANGUAGE_MODEL if self.task is LANGUAGE else "a classifier of images"
            raise UsageError(
                f"--model {self.model!r} does not fit --dataset {self.dataset}. "
                f"Accepted for that: {models}. Accepted with {_LANGUAGE_MODEL}: --dataset text."
            )
        self._check_method()
        if self.target is not None and self.ramp_epochs is None:
            # Written down, so that a run that goes on for more epochs keeps its ramp.
            ramp = max(1, int(_RAMP * (self.epochs - self.warmup_epochs)))
            object.__setattr__(self, "ramp_epochs", ramp)
        self._check_schedule()
        drops, highest = len(self.milestones), max(self.lr, self.threshold_lr or 0)
        if math.log10(highest) + drops * math.log10(self.gamma) > math.log10(MOST):
            raise UsageError(
                f"--gamma is {self.gamma!r}, which {drops} milestones raise to a learning rate "
                f"above {MOST:g}. Accepted: a smaller factor or fewer milestones."
            )

    def _check_method(self) -> None:
        """Refuse what does not go together; write down what follows from other options."""
        if self.method != "dst":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in (*ONLY_DST, *_NOT_WITH_RIVALS):
                if name not in _IN_PRESETS and getattr(self, name) != defaults[name]:
                    raise not_of_rival([name], self.method)
            check_method(self.method, self.density, self.method_options)
            if self.method_epochs is None:  # a run that goes on for more epochs keeps its schedule
                object.__setattr__(self, "method_epochs", self.epochs)
            return
        for name in ("method_options", "method_epochs"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{option(name)} with --method dst, which has none. Accepted: another --method."
                )
        if self.density is not None:
            check("--density", self.density, RULES["target"])
            if self.target is not None:
                raise UsageError(
                    f"--density {self.density} and --target {self.target} are the same option of "
                    "--method dst. Accepted: one of them."
                )
            object.__setattr__(self, "target", self.density)
            object.__setattr__(self, "density", None)

    def _check_schedule(self) -> None:
        if self.target is None and self.ramp_epochs is not None:
            raise UsageError(
                f"--ramp-epochs {self.ramp_epochs} without --target. Accepted: both or none."
            )
        if self.target is not None and self.freeze_epoch is not None:
            raise UsageError(
                f"--freeze-epoch {self.freeze_epoch} with --target, which fixes masks at the end "
                "of its ramp (--ramp-epochs). Accepted: one of them."
            )
        if self.restore_collapsed and self.fsdp:
            raise UsageError(
                "--restore-collapsed with --fsdp, which shards thresholds. Accepted: one of them."
            )
        if self.warmup_epochs + (self.ramp_epochs or 0) > self.epochs:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs} and --ramp-epochs {self.ramp_epochs} are "
                f"more than --epochs {self.epochs}. Accepted: as many or fewer together."
            )

    def alpha_at(self, epoch: int) -> float:
        """Return alpha in an epoch, counted from 0: none in the warm-up, then by its schedule."""
        done, epochs = epoch - self.warmup_epochs, self.epochs - self.warmup_epochs
        if done < 0:
            return 0.0
        if self.alpha_schedule == "constant":
            return self.alpha
        if self.alpha_schedule == "linear":
            return self.alpha * (done + 1) / epochs
        return self.alpha * (1 + math.cos(math.pi * done / epochs)) / 2

    @property
    def fixed_from(self) -> float:
        """Return after how many epochs masks are fixed; infinite: never."""
        if self.dense:
            return math.inf
        if self.target is not None:
            return self.warmup_epochs + (self.ramp_epochs or 0)
        return math.inf if self.freeze_epoch is None else self.freeze_epoch

    @property
    def kind(self) -> str:
        """Return what decides how sparse the model gets, in words."""
        if self.dense:
            return "dense"
        if self.rival is not None:
            return self.method + (f", density {self.density:g}" if self.density else "")
        return f"alpha {self.alpha:g}" if self.target is None else f"target {self.target:g}"

    @property
    def rival(self) -> str | None:
        """Return the method that chooses fixed masks; None where thresholds do, or there are none.

        It alone says so: a dense twin has the options of the sparse run.
        """
        return None if self.dense or self.method == "dst" else self.method

    @property
    def task(self) -> Task:
        """Return by what the run is judged."""
        return task_of(self.dataset)

    @staticmethod
    def parse(field: str, text: str) -> Any:
        """Return a field's value from its text on the command line; raises UsageError."""
        if field not in RULES:
            return text
        try:
            return RULES[field].parse(text)
        except ValueError:
            raise UsageError(
                f"{option(field)} is {text!r}. Accepted: {RULES[field].accepted}."
            ) from None

    @classmethod
    def from_preset(cls, preset: str, **given: Any) -> RunConfig:
        """Return the preset's configuration with the given fields replaced; raises UsageError."""
        require_one_of("--preset", preset, PRESETS)
        return cls(**{"preset": preset, **PRESETS[preset].values, **given})

    @property
    def execution(self) -> str:
        """Return how masked weights and their gradients are made: the fastest way that there is.

        "deferred": by the optimizer's step; "grouped": for all layers at once. All ways give the
        same trajectory up to rounding. "fixed masks": by each layer, under a method's masks.
        """
        if self.rival is not None:
            return "fixed masks"
        if self.dense or self.layer_by_layer:
            return "dense" if self.dense else "layer by layer"
        decays = self.weight_decay or self.threshold_weight_decay
        # Adam adds decay to the gradient, and no DST optimizer does: AdamW is another method.
        return "grouped" if self.optimizer == "adam" and decays else "deferred"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Return the configuration that `to_dict` described; raise UsageError for anything else."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping):
            raise UsageError(f"it is {values!r:.80}. Accepted: a mapping of options.")
        values = {**_IN_OLDER_FILES, **values}
        if set(values) != expected:
            odd = [str(name) for name in expected.symmetric_difference(values)]
            raise UsageError(
                f"missing or unknown are {', '.join(sorted(odd))!r:.300}. "
                "Accepted: a configuration written by dst-kernels train."
            )
        if isinstance(values["milestones"], list):
            values["milestones"] = tuple(values["milestones"])
        return cls(**values)


# What files mean that were written before there was an option.
_IN_OLDER_FILES = {
    "layer_by_layer": True,
    "compile": False,
    "init": None,
    "validation": None,
    "track": "none",
    "accumulate": 1,
    "clip_grad_norm": None,
    "fsdp": False,
    "graph": False,
    "alpha_schedule": "constant",
    "target": None,
    "ramp_epochs": None,
    "warmup_epochs": 0,
    "freeze_epoch": None,
    "restore_collapsed": False,
    "method": "dst",
    "density": None,
    "method_options": None,
    "method_epochs": None,
}


_IN_PRESETS = ("alpha", "threshold_weight_decay")  # of which other methods make nothing
_NOT_WITH_RIVALS = ("graph", "fsdp")  # a replay would change no masks; they need whole weights
ONLY_DST = (
    *("alpha", "alpha_schedule", "target", "ramp_epochs", "warmup_epochs", "freeze_epoch"),
    *("granularity", "surrogate", "reset_ratio", "restore_collapsed"),
    *("threshold_lr", "threshold_weight_decay"),
)
"""The fields that are about trained thresholds."""


def not_of_rival(names: Sequence[str], method: str) -> UsageError:
    """Return the error for options that a method other than dst cannot follow."""
    lacks = "trains no thresholds" if names[0] in ONLY_DST else "does not work with that"
    return UsageError(
        f"{', '.join(map(option, names))} with --method {method}, which {lacks}. "
        "Accepted: --method dst, or a command without."
    )


def option(field: str) -> str:
    """Return the name of a field on the command line."""
    return "--" + field.replace("_", "-")


_AT_LEAST_0 = number("a number of at least 0 and at most 1e30", lambda value: value >= 0)
_ABOVE_0 = number("a number above 0 and at most 1e30", lambda value: value > 0)

RULES = {
    "model": TEXT,
    "data_dir": TEXT,
    "device": TEXT,
    "init": or_none(TEXT),
    "dense": FLAG,
    "skip_first": FLAG,
    "skip_last": FLAG,
    "layer_by_layer": FLAG,
    "compile": FLAG,
    "graph": FLAG,
    "restore_collapsed": FLAG,
    "fsdp": FLAG,
    "validation": or_none(number("a number above 0 and below 1", lambda value: 0 < value < 1)),
    "image_size": integer(8, 4096),
    "alpha": _AT_LEAST_0,
    "target": or_none(number("a number above 0 and below 1", lambda value: 0 < value < 1)),
    "density": or_none(number("a number above 0 and at most 1", lambda value: 0 < value <= 1)),
    "method_options": or_none(PAIRS),
    "method_epochs": or_none(integer(1, 1_000_000)),
    "ramp_epochs": or_none(integer(1, 1_000_000)),
    "warmup_epochs": integer(0, 1_000_000),
    "freeze_epoch": or_none(integer(1, 1_000_000)),
    "epochs": integer(1, 1_000_000),
    "batch_size": integer(2, 1_048_576),
    "accumulate": integer(1, 1_048_576),
    "clip_grad_norm": or_none(_ABOVE_0),
    "lr": _ABOVE_0,
    "momentum": number("a number from 0 up to, but below, 1", lambda value: 0 <= value < 1),
    "weight_decay": _AT_LEAST_0,
    "threshold_lr": or_none(_AT_LEAST_0),
    "threshold_weight_decay": _AT_LEAST_0,
    "milestones": MILESTONES,
    "gamma": _ABOVE_0,
    "reset_ratio": or_none(number("a number from 0 to 1", lambda value: 0 <= value <= 1)),
    "seed": integer(0, 2**63 - 1),
    "workers": integer(0, 256),
    "threads": integer(0, 1024),
}
