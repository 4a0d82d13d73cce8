"""Who trains whole models: functions that make a `Training` of a `Setup`, by name.

A function raises where its provider cannot run; the message is recorded as the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import dst_kernels

from .baselines import (
    MaskedBaseline,
    authors_regularization,
    with_authors_layers_,
    with_branch_free_layers_,
)
from .models import ADAMW
from .training import MOMENTUM, Hyper, Setup, Training

__all__ = [
    "BRANCH_FREE",
    "MODEL_PROVIDERS",
    "REFERENCE",
    "STEP",
    "ModelProvider",
    "deferred_optimizer",
]

STEP = "step"


@dataclass(frozen=True)
class ModelProvider:
    """A contender.

    Args:
        name: its name in results and on the command line.
        train: makes its model and optimizer; may raise anything that keeps it from running.
        masked: whether it trains the masked model, and is verified against the reference.
        compiled: goes through torch.compile: measured after all others, as compiling takes long.
        graphable: a step can be captured in a CUDA graph.
    """

    name: str
    train: Callable[[Setup], Training]
    masked: bool = True
    compiled: bool = False
    graphable: bool = True
    passes: tuple[str, ...] = (STEP,)


def _dense(compile: bool = False) -> Callable[[Setup], Training]:
    def train(setup: Setup) -> Training:
        model = setup.network(lambda dense: dense)
        return Training(setup, model, setup.optimizer(model.parameters()), compile=compile)

    return train


def _masked(**options) -> Callable[[nn.Module], nn.Module]:
    config = dst_kernels.SparsifyConfig.paper(**options)
    return lambda model: dst_kernels.sparsify_(model, config)


def _ours(
    convert_: Callable[[nn.Module], nn.Module], compile: bool = False
) -> Callable[[Setup], Training]:
    """With torch's optimizer, as the README shows."""

    def train(setup: Setup) -> Training:
        model = setup.network(convert_)
        optimizer = setup.optimizer(dst_kernels.parameter_groups(model))
        return Training(setup, model, optimizer, dst_kernels.sparse_regularization, compile)

    return train


def _grouped(setup: Setup) -> Training:
    return _ours(lambda model: dst_kernels.group_(_masked()(model)))(setup)


def deferred_optimizer(
    kind: str, model: nn.Module, hyper: Hyper, backend: str = "auto"
) -> torch.optim.Optimizer:
    """Ours, which adds the regulariser's gradient itself."""
    from dst_kernels.optim import DSTSGD, DSTAdamW

    options = {"lr": hyper.lr, "weight_decay": hyper.weight_decay, "alpha": hyper.alpha}
    if kind == ADAMW:
        return DSTAdamW(model, **options, backend=backend)
    return DSTSGD(model, **options, momentum=MOMENTUM, backend=backend)


def _deferred(compile: bool = False) -> Callable[[Setup], Training]:
    def train(setup: Setup) -> Training:
        model = setup.network(_masked())
        optimizer = deferred_optimizer(setup.about.optimizer, model, setup.hyper)
        return Training(setup, model, optimizer, compile=compile)

    return train


def _theirs(
    convert_: Callable[[nn.Module], nn.Module], compile: bool = False
) -> Callable[[Setup], Training]:
    def train(setup: Setup) -> Training:
        model = setup.network(convert_)
        layers = [module for module in model.modules() if isinstance(module, MaskedBaseline)]
        thresholds = [threshold for layer in layers for threshold in layer.thresholds()]
        ids = set(map(id, thresholds))
        others = [p for p in model.parameters() if id(p) not in ids]
        groups = [{"params": others}, {"params": thresholds, "weight_decay": 0.0}]
        optimizer = setup.optimizer(groups)
        return Training(setup, model, optimizer, authors_regularization, compile)

    return train


REFERENCE = ModelProvider("reference", _ours(_masked(backend="reference")))
"""What is right: each layer by itself, in plain PyTorch. Not timed."""

BRANCH_FREE = ModelProvider("dst_eager_branchfree", _theirs(with_branch_free_layers_))
"""What plain PyTorch makes of it in the dtype at hand: the yardstick of errors. Not timed."""

# Compiled ones so that goals can be judged though the time is up before the last.
MODEL_PROVIDERS = (
    ModelProvider("dense", _dense(), masked=False),
    ModelProvider("deferred", _deferred()),
    ModelProvider("grouped", _grouped),
    ModelProvider("masked", _ours(_masked())),
    ModelProvider("dst_eager", _theirs(with_authors_layers_), graphable=False),
    ModelProvider("dst_compiled", _theirs(with_branch_free_layers_, compile=True), compiled=True),
    ModelProvider("deferred_compiled", _deferred(compile=True), compiled=True),
    ModelProvider("dense_compiled", _dense(compile=True), masked=False, compiled=True),
    ModelProvider("masked_compiled", _ours(_masked(), compile=True), compiled=True),
)
