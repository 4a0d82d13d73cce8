"""Train a model, from its first weights to its last epoch."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dst_kernels

from ..nn.find import named_masked_weights
from ..nn.switches import is_grouped
from ..nn.weight import is_of_mask
from ..optim import DSTSGD, DSTAdamW, TargetRatio
from ..optim.deferred import DeferredOptimizer
from . import processes, spread
from .config import RunConfig
from .data import Batches, Data
from .errors import DivergedError, UsageError
from .files import Record, best_record
from .graphed import GraphedStep
from .models import build_model, example_input
from .rules import Form, Rule, check, integer
from .sharing import Share
from .weights import load_weights

_CHECKED = 8  # images for check_masks: enough to reach every layer, and quick


class Observer:
    """Receive the events of training; this base class ignores them."""

    def step(self, total: Tensor, samples: int) -> None:
        """Act after a step; `total` is the loss summed over the `samples` of the epoch so far."""

    def epoch(self, record: Record) -> None:
        """Act after an epoch, once it is saved."""


class Observers(Observer):
    """Pass every event on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def step(self, total: Tensor, samples: int) -> None:
        for each in self.observers:
            each.step(total, samples)

    def epoch(self, record: Record) -> None:
        for each in self.observers:
            each.epoch(record)


@dataclass
class State:
    """Hold all that a run needs to continue as if it had never stopped.

    `rng`: the states of torch's global generators, the only source of random numbers. `seconds`:
    time spent training so far. `weights` and `best`: the whole state dicts, on the CPU, of the last
    epoch that was finished and of the best one; {} before, and without --validation. `copied`: what
    averages gradients over the processes that have a copy of the model. `controller`: what steers
    alpha, if there is a --target.
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
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # cuDNN's fastest
    _check_amp(model, config, data, device)
    controller = None
    if config.target is not None and not config.dense:
        steps = (config.ramp_epochs or 0) * len(data.train)
        controller = TargetRatio(model, config.target, steps)
    optimizer = _optimizer(model, config, controller)
    return State(model, optimizer, _rng_states(device), controller=controller)


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
    with _precision(config, images.device):
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
    weights: Form = {name: _like(t) for name, t in state.model.state_dict().items()}
    check("model", model, weights)
    check("best", checkpoint["best"], {} if config.validation is None else weights)
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
    controller: Form = {}
    if state.controller is not None:
        expected = state.controller.state_dict()
        controller = {
            name: _like(value) for name, value in expected.items() if name != "steps_done"
        }
        controller = {"steps_done": integer(0), **controller}
    check("controller", checkpoint["controller"], controller)
    state.model.load_state_dict(model)
    if state.controller is not None:
        state.controller.load_state_dict(checkpoint["controller"])
    state.optimizer.load_state_dict(
        {"state": optimizer, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )
    state.history, state.seconds = checkpoint["history"], checkpoint["seconds"]
    state.weights, state.best = model, checkpoint["best"]
    state.rng = checkpoint["rng"]


_ANY = Rule("anything", lambda value: True)


def _optimizer_state(config: RunConfig, parameter: Tensor) -> Form:
    if config.optimizer == "sgd":
        return {"momentum_buffer": _like(parameter)}
    moments = {"exp_avg": _like(parameter), "exp_avg_sq": _like(parameter)}
    return {"step": _like(torch.tensor(0.0)), **moments}


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
        with _precision(config, device):
            model.eval()(example_input(data.shape).to(device))
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"--amp {config.amp}: torch cannot run --model {config.model} in bfloat16 on this "
            f"{device.type.upper()} ({reason}). Accepted here: --amp none."
        ) from error
    model.train(training)


def train(
    state: State,
    config: RunConfig,
    data: Data,
    observer: Observer,
    save: Callable[[State], None],
) -> None:
    """Train `state` to the last epoch, and save it after each.

    Raises DivergedError if a loss becomes infinite or NaN.
    """
    device = next(state.model.parameters()).device
    while len(state.history) < config.epochs:
        started = time.perf_counter()
        _set_rng_states(state.rng)  # an observer or the twin's training may have drawn numbers
        epoch = len(state.history)
        lr = _set_learning_rates(state.optimizer, config, epoch)
        train_loss = _train_epoch(state, config, data, observer)
        if epoch + 1 == config.fixed_from:
            if state.controller is None:  # else that has done it
                dst_kernels.freeze_masks_(state.model)
            if state.copied is not None:  # DDP waits for the gradients of thresholds
                state.copied = None
                state.copied = spread.copied(state.model)
        validation = {}
        if data.validation is not None:
            loss, quality = evaluate(state.model, config, data.validation)
            validation = {"validation_loss": loss, config.task.validation_key: quality}
        test_loss, quality = evaluate(state.model, config, data.test)
        if not math.isfinite(train_loss + test_loss + quality + sum(validation.values())):
            raise DivergedError(
                f"training diverged: the losses of epoch {epoch + 1} are {train_loss:g} in "
                f"training and {test_loss:g} in the test. "
                f"--lr is {config.lr:g}, --{config.kind}: try smaller ones."
            )
        report = None if config.dense else dst_kernels.sparsity_report(state.model)
        record = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train_loss,
            **validation,
            "test_loss": test_loss,
            config.task.key: quality,
            "remaining_ratio": report.remaining_ratio if report else 1.0,
            "layers": {layer.name: layer.remaining_ratio for layer in report.layers}
            if report
            else {},
        }
        state.history.append(record)
        state.weights = spread.whole(state.model.state_dict())
        if best_record(state.history) is record:
            state.best = state.weights
        state.rng = _rng_states(device)
        state.seconds += time.perf_counter() - started
        save(state)
        observer.epoch(record)


def _train_epoch(state: State, config: RunConfig, data: Data, observer: Observer) -> float:
    """Train for one epoch; return the mean cross-entropy (without the regulariser)."""
    trained = state.copied or state.model
    called: Callable = torch.compile(trained) if config.compile else trained
    state.model.train()
    regularized = config.execution in ("grouped", "layer by layer")  # else in the step, or never
    epoch = len(state.history)
    warm = epoch < config.warmup_epochs
    alpha: float | Tensor = 0.0 if warm else config.alpha
    if state.controller is not None:
        alpha = state.controller.alpha
    order = _order(config, epoch)
    total = torch.zeros((), device=next(state.model.parameters()).device)
    samples = 0
    state.optimizer.zero_grad(set_to_none=True)

    def run(
        images: Tensor, labels: Tensor, weight: float = 1.0, last_of_step: bool = True
    ) -> Tensor:
        with spread.synchronised(trained, last_of_step):
            with _precision(config, images.device):
                loss = _cross_entropy(called(images), labels)
            objective = loss if weight == 1 else weight * loss
            if regularized and last_of_step:
                penalty = dst_kernels.sparse_regularization(state.model)
                objective = objective + alpha * penalty
            objective.backward()
        if last_of_step:
            if config.clip_grad_norm is not None:
                _clip(state.optimizer, config.clip_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    graphed = GraphedStep(run) if config.graph else None  # of this epoch: learning rates change
    for part, (images, labels, weight) in enumerate(data.train.epoch(order, _share(config)), 1):
        last_of_step = part % config.accumulate == 0
        if graphed is None:
            loss = run(images, labels, weight, last_of_step)
        else:
            loss = graphed(images, labels)
        if weight:
            total = total + loss * labels.numel()  # summed on the device: no wait in the loop
            samples += labels.numel()
        if last_of_step:
            if state.controller is not None and not warm:
                state.controller.step()
            observer.step(total, samples)
    if order is not torch.default_generator:
        torch.set_rng_state(order.get_state())
    spread.average_buffers(state.model)
    total_of_all, samples_of_all = processes.total(total, samples)
    return total_of_all / samples_of_all


def _share(config: RunConfig) -> Share:
    first = processes.rank() * config.accumulate
    return Share(first, config.accumulate, processes.count() * config.accumulate)


def _order(config: RunConfig, epoch: int) -> torch.Generator:
    """Return the generator that shuffles.

    It is the global one, from which all else is drawn, too. Of several processes each has a global
    one of its own, for dropout and the like, but all need the same order.
    """
    if not processes.joined():
        return torch.default_generator
    order = torch.Generator()
    order.set_state(torch.get_rng_state())
    torch.manual_seed(hash((config.seed, epoch, processes.rank())) % 2**63)
    return order


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients that the step will use to a norm of at most `max_norm`."""
    if isinstance(optimizer, DeferredOptimizer):
        optimizer.clip_grad_norm_(max_norm)
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)


@torch.no_grad()
def evaluate(model: nn.Module, config: RunConfig, batches: Batches) -> tuple[float, float]:
    """Return the mean loss, and the quality as the task defines it, on these batches in order.

    Several processes share the batches.
    """
    model.eval()
    loss: Tensor | float = 0.0
    correct: Tensor | float = 0
    samples = 0
    share = Share(processes.rank(), 1, processes.count())
    with contextlib.nullcontext() if config.dense else dst_kernels.weights_unchanged(model):
        for images, labels, weight in batches.epoch(None, share):
            with _precision(config, images.device):
                logits = model(images)
                part = _cross_entropy(logits, labels, reduction="sum")
            if weight:
                loss = loss + part
                correct = correct + (logits.argmax(-1) == labels).sum()
                samples += labels.numel()
    loss_of_all, correct_of_all, count = processes.total(loss, correct, samples)
    mean = loss_of_all / count
    return mean, config.task.measure(mean, correct_of_all / count)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of logits [*labels.shape, classes]."""
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def _precision(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16")


def _set_learning_rates(optimizer: torch.optim.Optimizer, config: RunConfig, epoch: int) -> float:
    """Set each group's learning rate for the epoch; return that of the weights.

    In the warm-up thresholds stay at 0, without a regulariser.
    """
    decay = config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    warm = epoch < config.warmup_epochs
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * decay
        if warm and group.get("name") == "thresholds":
            group["lr"] = 0.0
        if "alpha" in group and config.target is None:
            group["alpha"] = 0.0 if warm else config.alpha
    return config.lr * decay


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
