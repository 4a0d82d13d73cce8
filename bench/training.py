"""A model, an optimizer and one batch, ready to be stepped: the work that is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .compiling import compiled, compiled_network
from .models import ADAMW, MODELS, SGD, Loss, Model
from .modes import Mode
from .problem import thresholds_for

__all__ = ["AT_REST", "LEARNING", "MOMENTUM", "Hyper", "Setup", "Training", "torch_optimizer"]

MOMENTUM = 0.9

Penalty = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Hyper:
    """Numbers of a recipe. `alpha`: of the regulariser. Thresholds have no weight decay."""

    lr: float
    weight_decay: float
    alpha: float


AT_REST = Hyper(lr=0.0, weight_decay=1e-4, alpha=1e-4)
"""For timings: the work of a step, after which the case is still what it says."""

LEARNING = {
    SGD: Hyper(lr=0.02, weight_decay=0.1, alpha=0.05),
    ADAMW: Hyper(lr=0.002, weight_decay=5.0, alpha=0.5),
}
"""For checks: everything that a step does shows in a few steps, and no layer collapses."""


@dataclass(frozen=True)
class Setup:
    """What is trained: the same for every provider and every run.

    Args:
        model: a name in `models.MODELS`.
        batch: samples of it.
        remaining_ratio: share of each row of masked weights that the thresholds keep at first.
    """

    model: str
    batch: int
    remaining_ratio: float
    device: torch.device
    mode: Mode
    hyper: Hyper

    @property
    def about(self) -> Model:
        return MODELS[self.model]

    def optimizer(self, parameters: Iterable) -> torch.optim.Optimizer:
        """torch's own, for parameters or groups of them."""
        return torch_optimizer(self.about.optimizer, self.hyper, self.device, parameters)

    def data(self) -> tuple[Tensor, Tensor]:
        """(input, target) of the batch."""
        generator = torch.Generator(self.device).manual_seed(0)
        return self.about.data(self.batch, generator, self.mode)

    def network(self, convert_: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The model with layers as `convert_` makes them, in training mode."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self.device:
            torch.manual_seed(0)
            dense = self.about.network()
        dense.to(dtype=self.mode.weight, memory_format=torch.channels_last)
        model = convert_(dense).train()
        with torch.no_grad():
            for layer in model.modules():
                for name, threshold in layer.named_parameters(recurse=False):
                    if name.startswith("threshold"):
                        rows = getattr(layer, name.replace("threshold", "weight")).flatten(1)
                        threshold.copy_(thresholds_for(rows, self.remaining_ratio))
        return model


def torch_optimizer(
    kind: str, hyper: Hyper, device: torch.device, parameters: Iterable
) -> torch.optim.Optimizer:
    """torch's own for parameters or groups of them: fused on CUDA."""
    options = {"lr": hyper.lr, "weight_decay": hyper.weight_decay}
    on_gpu = device.type == "cuda"
    if on_gpu:
        options["fused"] = True
    if kind == ADAMW:
        return torch.optim.AdamW(parameters, **options, capturable=on_gpu)
    return torch.optim.SGD(parameters, **options, momentum=MOMENTUM)


class Objective(nn.Module):
    """Loss (or output, where the target is its gradient) and weighted penalty (or None).

    What a provider that compiles has compiled, optimizer aside.
    """

    def __init__(
        self, model: nn.Module, loss: Loss | None, penalty: Penalty | None, alpha: float
    ) -> None:
        super().__init__()
        self.model, self.loss, self.penalty, self.alpha = model, loss, penalty, alpha

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.model(input)
        result = output if self.loss is None else self.loss(output, target)
        return result, None if self.penalty is None else self.alpha * self.penalty(self.model)


class Training:
    """One batch, over and over.

    Args:
        setup: says what `model` is trained on.
        model, optimizer: as their provider made them; the optimizer may keep weights of its own.
        penalty: the regulariser, where the loss has it.
        compile: whether the objective goes through torch.compile.
    """

    def __init__(
        self,
        setup: Setup,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Penalty | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.optimizer, self._setup = model, optimizer, setup
        self._input, self._target = setup.data()
        self._has_loss = setup.about.loss is not None
        objective = Objective(model, setup.about.loss, penalty, setup.hyper.alpha)
        if compile:
            objective = compiled_network(objective) if self._has_loss else compiled(objective)
        self._objective = objective

    def step(self) -> Tensor:
        """One step; the loss, without the penalty, as it was before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        self._input.grad = None
        with self._setup.mode.autocast(self._setup.device.type):
            result, penalty = self._objective(self._input, self._target)
        if self._has_loss:
            (result if penalty is None else result + penalty).backward()
        elif penalty is None:
            result.backward(self._target)
        else:
            torch.autograd.backward((result, penalty), (self._target, None))
        self.optimizer.step()
        return result.detach()

    def value(self, result: Tensor) -> float:
        """What `step` returned, as one number also where it was the output."""
        if self._has_loss:
            return result.item()
        return (result.double() * self._target.double()).sum().item()
