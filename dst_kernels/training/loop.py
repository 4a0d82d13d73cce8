"""Train a model, from its first weights to its last epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dst_kernels

from ..optim.deferred import DeferredOptimizer
from . import processes, spread
from .config import RunConfig
from .data import Batches, Data
from .errors import DivergedError
from .files import Record, best_record
from .graphed import GraphedStep
from .masks import COLUMNS, Masks
from .sharing import Share
from .state import State, precision, rng_states, set_rng_states


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
    followed = not config.dense and (not state.history or COLUMNS[0] in state.history[0])
    masks = Masks(state.model, state.ever) if followed else None
    while len(state.history) < config.epochs:
        started = time.perf_counter()
        set_rng_states(state.rng)  # an observer or the twin's training may have drawn numbers
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
            raise diverged(
                config,
                f"the losses of epoch {epoch + 1} are {train_loss:g} in training and "
                f"{test_loss:g} in the test",
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
        if masks is not None and report is not None:
            dead_rows = sum(layer.dead_rows for layer in report.layers)
            values = (*masks.update(state.model), dead_rows)
            record |= dict(zip(COLUMNS, values, strict=True))
            state.ever = masks.packed()
        state.history.append(record)
        state.weights = spread.whole(state.model.state_dict())
        if best_record(state.history) is record:
            state.best = state.weights
        state.rng = rng_states(device)
        state.seconds += time.perf_counter() - started
        save(state)
        observer.epoch(record)


def diverged(config: RunConfig, found: str) -> DivergedError:
    """Return the error for losses that are infinite or NaN; `found` says which."""
    advice = f"--lr is {config.lr:g}, --{config.kind}: try smaller ones"
    if config.dense or config.rival is not None:
        advice = f"--lr is {config.lr:g}: try a smaller one"
    return DivergedError(f"training diverged: {found}. {advice}.")


def _train_epoch(state: State, config: RunConfig, data: Data, observer: Observer) -> float:
    """Train for one epoch; return the mean cross-entropy (without the regulariser)."""
    trained = state.copied or state.model
    called: Callable = torch.compile(trained) if config.compile else trained
    state.model.train()
    regularized = config.execution in ("grouped", "layer by layer")  # else in the step, or never
    epoch = len(state.history)
    warm = epoch < config.warmup_epochs
    alpha: float | Tensor = config.alpha_at(epoch)
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
            with precision(config, images.device):
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
            if state.method is not None:
                state.method.step()  # it may look at the gradients
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
            if state.restore is not None:
                state.restore.step()
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
            with precision(config, images.device):
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
            group["alpha"] = config.alpha_at(epoch)
    return config.lr * decay
