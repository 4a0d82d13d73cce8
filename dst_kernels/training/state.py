"""Make what a run trains: model, optimizer and random numbers, new or from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dst_kernels

from ..methods.method import Method
from ..nn.find import named_masked_weights
from ..nn.switches import is_grouped
from ..nn.weight import is_of_mask
from ..optim import DSTSGD, DSTAdamW, RestoreCollapsed, TargetRatio
from ..optim.deferred import DeferredOptimizer
from . import processes, spread
from .config import RunConfig
from .data import Data
from .errors import UsageError
from .files import Record
from .masks import COLUMNS
from .models import build_model, example_input
from .rivals import new_method
from .rules import FLAG, Form, Rule, check, number
from .weights import load_weights

HELPERS = ("controller", "restore", "method")
_CHECKED = 8  # images for check_masks: enough to reach every layer, and quick


@dataclass
class State:
    """Hold all that a run needs to continue as if it had never stopped.

    `rng`: the states of torch's global generators, the only source of random numbers. `seconds`:
    time spent training so far. `weights` and `best`: the whole state dicts, on the CPU, of the last
    epoch that was finished and of the best one; {} before, and without --validation. `ever`: which
    weights were ever kept (`Masks.packed`). `copied`: what averages gradients over the processes
    that have a copy of the model. `controller`: what steers alpha, if there is a --target.
    `restore`: what --restore-collapsed asks for. `method`: what --method asks for, if not dst.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rng: dict[str, Tensor]
    history: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    copied: nn.Module | None = None
    controller: TargetRatio | None = None
    restore: RestoreCollapsed | None = None
    method: Method | None = None
    ever: dict[str, Tensor] = field(default_factory=dict)

    @property
    def helpers(self) -> dict[str, Any]:
        """Return what acts on masks beside the optimizer, by its name in a checkpoint, or None."""
        return {name: getattr(self, name) for name in HELPERS}


def new_state(
    config: RunConfig, data: Data, device: torch.device, *, initial: bool = True
) -> State:
    """Return newly initialised weights and a new optimizer.

    The weights are those of --init, if that is given and they are the `initial` ones. Raises
    UsageError if they do not fit, or if torch cannot run the model in the dtype of --amp.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, data.shape, data.classes)
    if initial and config.init is not None:
        load_weights(model, Path(config.init))
    model = model.to(device)
    if device.type == "cuda" and torch.version.hip is None:
        model = model.to(memory_format=torch.channels_last)  # cuDNN's fastest
    _check_amp(model, config, data, device)
    controller = None
    if config.target is not None and not config.dense:
        steps = (config.ramp_epochs or 0) * len(data.train)
        controller = TargetRatio(model, config.target, steps)
    optimizer = _optimizer(model, config, controller)
    restores = config.restore_collapsed and not config.dense
    restore = RestoreCollapsed(model) if restores else None
    method = None
    if config.rival is not None:
        method = new_method(config, model, optimizer, len(data.train))
    return State(
        model,
        optimizer,
        rng_states(device),
        controller=controller,
        restore=restore,
        method=method,
    )


_TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def _optimizer(
    model: nn.Module, config: RunConfig, controller: TargetRatio | None
) -> torch.optim.Optimizer:
    if config.dense:
        groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
    else:
        groups = dst_kernels.parameter_groups(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            threshold_lr=config.threshold_lr,
            threshold_weight_decay=config.threshold_weight_decay,
        )
        if config.rival is not None:
            groups = groups[:1]  # nothing trains thresholds
    options: dict[str, Any] = {"lr": config.lr}
    if config.graph and config.execution != "deferred" and config.optimizer != "sgd":
        options["capturable"] = True  # steps are then counted on the device
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    if config.execution == "deferred":
        options["alpha"] = config.alpha if controller is None else controller.alpha
        if config.optimizer == "sgd":
            return DSTSGD(model, groups, **options)
        return DSTAdamW(model, groups, **options)  # Adam, without decay, which the groups then say
    if config.execution == "grouped":
        dst_kernels.group_(model)
    return _TORCH[config.optimizer](groups, **options)


def spread_(state: State, config: RunConfig) -> None:
    """Let several processes train the model together: DDP copies it, --fsdp cuts it in pieces."""
    if not processes.joined():
        return
    if not config.fsdp:
        state.copied = spread.copied(state.model)
        return
    whole = state.optimizer
    if isinstance(whole, DeferredOptimizer):
        whole.release()
    if is_grouped(state.model):
        dst_kernels.ungroup_(state.model)
    spread.shard_(state.model)
    state.optimizer = _optimizer(state.model, config, state.controller)
    spread.adopt_state(state.optimizer, whole)


def check_masks(state: State, config: RunConfig, data: Data) -> None:
    """Warn of masks that do not act on the first images; raise UsageError if none of them does."""
    if config.dense:
        return
    images = next(iter(data.train.epoch(torch.Generator()))).inputs[:_CHECKED]
    with precision(config, images.device):
        problems = dst_kernels.check_masks(state.model, images, optimizers=[state.optimizer])
    if problems:
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        if len(problems) == len(list(named_masked_weights(state.model))):
            raise UsageError(
                f"--model {config.model!r}: no mask acts ({found}). Accepted: a model whose masks "
                "change its output, or --dense."
            )
        warnings.warn(f"masks that do not act: {found}", stacklevel=2)


def restore(state: State, config: RunConfig, checkpoint: Mapping[str, Any]) -> None:
    """Give a new state what a checkpoint holds; raise UsageError if that does not fit it.

    The optimizer's groups follow from the configuration, so only its state is taken.
    """
    model, optimizer = checkpoint["model"], checkpoint["optimizer"]["state"]
    if any(is_of_mask(name, "fixed_mask") for name in model):
        dst_kernels.freeze_masks_(state.model)  # which the state dict then replaces
    weights: dict[str, Form] = {n: _like(t) for n, t in state.model.state_dict().items()}
    check("model", model, weights)
    best = checkpoint["best"]
    # Its epoch may have been before the masks were fixed.
    earlier = {
        n: form for n, form in weights.items() if n in best or not is_of_mask(n, "fixed_mask")
    }
    check("best", best, {} if config.validation is None else earlier)
    held_out = {key: _ANY for key in checkpoint["history"][0] if key == "validation_loss"}
    check("history[0]", held_out, {} if config.validation is None else {"validation_loss": _ANY})
    groups = state.optimizer.param_groups
    check(
        "optimizer.state",
        optimizer,
        {
            index: _optimizer_state(config, parameter)
            for index, parameter in enumerate(p for group in groups for p in group["params"])
            if config.optimizer != "sgd" or config.momentum
        },
    )
    if not config.dense:
        names = {name: _ANY for name, _ in named_masked_weights(state.model)}
        check("history[0].layers", checkpoint["history"][0]["layers"], names)
    for name, helper in state.helpers.items():
        check(name, checkpoint[name], _form_of(helper.state_dict() if helper else {}))
    bits: Form = {}
    if COLUMNS[0] in checkpoint["history"][0]:  # not in files of earlier versions
        parts = named_masked_weights(state.model)
        sizes = {name: -(-part.weight.numel() // 8) for name, part in parts}
        bits = {n: _like(torch.empty(size, dtype=torch.uint8)) for n, size in sizes.items()}
    check("ever", checkpoint["ever"], bits)
    state.model.load_state_dict(model)
    for name, helper in state.helpers.items():
        if helper is not None:
            helper.load_state_dict(checkpoint[name])
    state.optimizer.load_state_dict(
        {"state": optimizer, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )
    state.history, state.seconds = checkpoint["history"], checkpoint["seconds"]
    state.weights, state.best, state.ever = model, checkpoint["best"], checkpoint["ever"]
    state.rng = checkpoint["rng"]


_ANY = Rule("anything", lambda value: True)


def _optimizer_state(config: RunConfig, parameter: Tensor) -> Form:
    if config.optimizer == "sgd":
        return {"momentum_buffer": _like(parameter)}
    moments = {"exp_avg": _like(parameter), "exp_avg_sq": _like(parameter)}
    return {"step": _like(torch.tensor(0.0)), **moments}


def _form_of(state: Any) -> Form:
    """Accept what has the keys of this state, tensors like its, and numbers."""
    if isinstance(state, dict):
        return {name: _form_of(value) for name, value in state.items()}
    if isinstance(state, Tensor):
        return _like(state)
    if isinstance(state, bool):
        return FLAG
    return number("a number", lambda value: True) if isinstance(state, (int, float)) else _ANY


def _like(tensor: Tensor) -> Rule:
    """Accept tensors on the CPU with the shape and dtype of this one."""
    return Rule(
        f"a tensor of {tensor.dtype} {list(tensor.shape)} on cpu",
        lambda value: (
            isinstance(value, Tensor)
            and (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
            and (value.layout, value.device.type) == (torch.strided, "cpu")
        ),
    )


@torch.no_grad()
def _check_amp(model: nn.Module, config: RunConfig, data: Data, device: torch.device) -> None:
    """Try a forward: on a CPU without AVX-512, for example, torch has no LSTM in bfloat16."""
    if config.amp == "none":
        return
    training = model.training
    try:
        with precision(config, device):
            model.eval()(example_input(data.shape).to(device))
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"--amp {config.amp}: torch cannot run --model {config.model} in bfloat16 on this "
            f"{device.type.upper()} ({reason}). Accepted here: --amp none."
        ) from error
    model.train(training)


def precision(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the scope in which a run's forwards are: that of --amp."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16")


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators, of the CPU and of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Give torch's global generators the states that `rng_states` returned."""
    for kind, state in states.items():
        module = torch if kind == "cpu" else torch.get_device_module(kind)
        if kind == "cpu" or module.is_available():
            module.set_rng_state(state)
