"""A model that a deferred optimizer trains, beside one that masks layer by layer with torch's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.nn import MaskedLayer
from dst_kernels.optim import DSTSGD, DSTAdamW
from tests.ops import authors

RULES = {
    "sgd": (DSTSGD, torch.optim.SGD),
    "adamw": (DSTAdamW, torch.optim.AdamW),
}
OURS_ALONE = ("alpha", "bucket_mb", "backend")


@dataclasses.dataclass
class Side:
    """A model and its optimizer. `in_loss` says whether the regulariser is a term of the loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    in_loss: bool

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model(input), target)

    def regularizer(self, alphas: Sequence[Any]) -> Tensor | float:
        """To be added to the loss."""
        layers = [layer for layer in masked_layers(self.model) if layer.weight.requires_grad]
        thresholds = {id(layer.threshold) for layer in layers}
        terms = [
            alpha * authors.regularizer([p])
            for group, alpha in zip(self.optimizer.param_groups, alphas, strict=True)
            for p in group["params"]
            if self.in_loss and alpha is not None and id(p) in thresholds
        ]
        return sum(terms)


class Twins:
    """`groups(model)` gives param groups in which alpha may stand; `options` are for all groups.

    With alpha_in_loss the deferred optimizer gets no alpha either. `tolerance` is relative.
    """

    tolerance = 1e-12  # what 200 steps make of another order of additions in float64

    def __init__(
        self,
        model: nn.Module,
        rule: str = "sgd",
        groups: Callable[[nn.Module], list] = dst_kernels.parameter_groups,
        alpha_in_loss: bool = False,
        **options: Any,
    ) -> None:
        deferred, plain = RULES[rule]
        models = model, copy.deepcopy(model)
        of_ours, of_theirs = (groups(each) for each in models)
        default = options.get("alpha")
        self._alphas = [group.get("alpha", default) for group in of_ours]
        if alpha_in_loss:
            of_ours = [without(group, ("alpha",)) for group in of_ours]
            options = without(options, ("alpha",))
        of_theirs = [without(group, OURS_ALONE) for group in of_theirs]
        self.alpha_in_loss = alpha_in_loss
        self.ours = Side(models[0], deferred(models[0], of_ours, **options), alpha_in_loss)
        self.theirs = Side(models[1], plain(of_theirs, **without(options, OURS_ALONE)), True)
        self.sides = self.ours, self.theirs
        self.resets = 0  # layers that their forward reset

    @property
    def alphas(self) -> list:
        if not self.alpha_in_loss:
            return [group["alpha"] for group in self.ours.optimizer.param_groups]
        return self._alphas

    def both(self, do: Callable[[Side], Any]) -> list:
        return [do(side) for side in self.sides]

    def on_models(self, do: Callable[[nn.Module], Any]) -> None:
        """Something that a user does to a model, between steps."""
        with torch.no_grad():
            self.both(lambda side: do(side.model))

    def backward(self, input: Tensor, target: Tensor) -> None:
        losses = []
        for side in self.sides:
            before = thresholds_of(side.model)
            loss = side.loss(input, target)
            (loss + side.regularizer(self.alphas)).backward()
            losses.append(loss.detach())
            if side is self.theirs:
                self.resets += was_reset(before, thresholds_of(side.model))
        self._assert_close(losses[0], losses[1], "loss")

    def step(self, input: Tensor, target: Tensor) -> None:
        self.both(lambda side: side.optimizer.zero_grad())
        self.backward(input, target)
        self.both(lambda side: side.optimizer.step())

    def train(self, data: Sequence[tuple[Tensor, Tensor]], steps: int, each_step=None) -> None:
        """`each_step(index)` runs before each step."""
        for i in range(steps):
            if each_step is not None:
                each_step(i)
            self.step(*data[i % len(data)])

    def assert_same(self, input: Tensor | None = None) -> None:
        """Everything that is trained and kept, after a forward that commits what is due.

        Layer by layer a reset is committed in the forward, deferred in the step before it.
        """
        if input is not None:
            with torch.no_grad():
                self._assert_close(*self.both(lambda side: side.model(input)), "output")
        mine, yours = self.both(lambda side: side.model.state_dict())
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            self._assert_close(tensor, yours[name], name)
        self._assert_same_state()

    def _assert_same_state(self) -> None:
        mine, yours = self.both(lambda side: side.optimizer.state_dict()["state"])
        assert mine.keys() == yours.keys()
        for index, state in mine.items():
            kept = {key: value for key, value in yours[index].items() if value is not None}
            assert state.keys() == kept.keys()
            for key, value in state.items():
                self._assert_close(value, kept[key], f"{key} of parameter {index}")

    def _assert_close(self, a: Tensor, b: Tensor, what: str) -> None:
        assert_close(a, b, what, self.tolerance)


def without(options: dict, names: Sequence[str]) -> dict:
    return {key: value for key, value in options.items() if key not in names}


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def thresholds_of(model: nn.Module) -> list[Tensor]:
    return [layer.threshold.detach().clone() for layer in masked_layers(model)]


def was_reset(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    pairs = zip(before, after, strict=True)
    return sum(bool((b != 0).any() and (a == 0).all()) for b, a in pairs)


def assert_same_dtypes(twins: Twins) -> None:
    """Of all that the optimizers keep."""
    mine, yours = twins.both(lambda side: side.optimizer.state_dict()["state"])
    for index, state in mine.items():
        for key, value in state.items():
            assert value.dtype == yours[index][key].dtype, (index, key)


def assert_close(a: Tensor, b: Tensor, what: str, tolerance: float = Twins.tolerance) -> None:
    """`tolerance` in units of the largest element."""
    scale = b.abs().max().item() if b.numel() else 0.0
    options = {"rtol": tolerance, "atol": tolerance * scale, "msg": lambda m: f"{what}: {m}"}
    torch.testing.assert_close(a.detach(), b.detach(), **options)


def batches(shape: Sequence[int], count: int = 4, size: int = 16, dtype=torch.float64) -> list:
    """(input, target) of four classes; from a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, size, *shape, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 4, (count, size), generator=generator)
    return list(zip(inputs, targets, strict=True))
