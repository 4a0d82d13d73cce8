"""Build the methods that --method names, from what a run knows and what --method-options says."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .. import methods
from ..methods.method import Method
from .errors import UsageError, require_one_of

if TYPE_CHECKING:
    from .config import RunConfig

RIVALS: dict[str, type[Method]] = {
    "set": methods.SET,
    "deep-r": methods.DeepR,
    "dsr": methods.DynamicSparseReparameterization,
    "dns": methods.DynamicNetworkSurgery,
    "sparse-momentum": methods.SparseMomentum,
    "rigl": methods.RigL,
    "str": methods.STR,
    "magnitude": methods.MagnitudePruning,
}
METHODS = ("dst", *RIVALS)

# What a run says itself: by other options, or by --skip-first and --skip-last.
_SAID_ELSEWHERE = ("self", "model", "optimizer", "density", "dense", "seed")


def check_method(name: str, density: float | None, options: str | None) -> None:
    """Raise UsageError unless the method of that name (not dst) takes the density and options."""
    known = _parameters(name)
    if density is None and "density" in known and _is_needed(known["density"]):
        raise UsageError(f"--density is None. Accepted with --method {name}: a share of weights.")
    if density is not None and "density" not in known:
        taken = ", ".join(_accepted(name))
        raise UsageError(
            f"--density {density:g} with --method {name}, which finds its own. Accepted: none; its "
            f"--method-options ({taken}) decide."
        )
    for given in parse_options(options):
        require_one_of(
            "--method-options: the name", given, _accepted(name),
            note=f"{', '.join(_accepted(name))} for --method {name}",
        )  # fmt: skip


def parse_options(text: str | None) -> dict[str, Any]:
    """Return the values of name=value pairs with commas between; raise UsageError for others."""
    found: dict[str, Any] = {}
    for pair in text.split(",") if text else ():
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in found:
            raise UsageError(
                f"--method-options is {text!r}. Accepted: different names with a number, true, "
                "false or a word each, such as every=938,rate=0.5."
            )
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def new_method(config: RunConfig, model: nn.Module, optimizer: Optimizer, steps: int) -> Method:
    """Return the configured method, which fixes the model's masks; `steps` are those of an epoch.

    What a constructor needs and --method-options does not say follows from the run: `every` is an
    epoch, `steps` all steps of --method-epochs. Raises UsageError for what it refuses.
    """
    known, options = _parameters(config.method), parse_options(config.method_options)
    of_run = {"every": steps, "steps": steps * (config.method_epochs or config.epochs)}
    for name, value in of_run.items():
        if name in known and _is_needed(known[name]):
            options.setdefault(name, value)
    if config.density is not None:
        options["density"] = config.density
    try:
        return RIVALS[config.method](model, optimizer, seed=config.seed, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {config.method}: {error}") from error


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(RIVALS[name]).parameters)


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _accepted(name: str) -> list[str]:
    """Return the names that --method-options may have."""
    return [
        each.name
        for each in _parameters(name).values()
        if each.name not in _SAID_ELSEWHERE and each.kind is not each.VAR_KEYWORD
    ]
