"""Share what all methods need: weights under masks that a rule chooses, and changes of those."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from ..arguments import require, require_integer, require_number
from ..model.freeze import unwrapped_parts
from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor
from .starts import layer_counts, random_mask, random_places


class Layer:
    """Hold one weight that a method masks, with all modules that use it.

    Attributes:
        index: its place among the model's masked weights.
        names, parts: of the modules that use it. Each has a mask of its own; they are kept equal.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.names: list[str] = []
        self.parts: list[MaskedWeight] = []

    @property
    def weight(self) -> Parameter:
        """Return the parameter; its values where the mask is False have no effect."""
        return self.parts[0].weight  # type: ignore[return-value]

    @property
    def mask(self) -> Tensor:
        """Return the boolean mask, of the weight's shape. Do not change it: use `set_mask`."""
        mask = self.parts[0].fixed_mask
        if mask is None:
            raise RuntimeError(f"the mask of {self.names[0] or 'the model'} is no longer fixed")
        return mask

    def set_mask(self, mask: Tensor) -> None:
        """Compute with this boolean mask from now on; nothing waits for the device."""
        for part in self.parts:
            part.module._buffers[part.fixed_mask_name].copy_(mask)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (out, in, *kernel); matrices that are stacked in one weight count as one."""
        return tuple(self.parts[0].rows(self.weight).shape)


class Method:
    """Train the masked weights of a model under masks that a rule chooses; the base of all rules.

    Build it after the optimizer and before DistributedDataParallel or torch.compile, then call
    `step` after each step of the optimizer, before gradients are dropped:

        method = dst_kernels.methods.SET(model, optimizer, density=0.05, every=1000)
        for inputs, labels in batches:
            loss_of(model(inputs), labels).backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()

    Each layer computes with its weight where the mask is True and with 0 elsewhere; thresholds do
    not train. Masks are the modules' buffers `fixed_mask` (see `freeze_masks_`), so that reports,
    `finalize_`, checkpoints and copies know them. Random choices follow from `seed`, the number of
    steps and the layer: all processes of a distributed run make the same.

    Args of all methods:
        model: with masked layers (`dst_kernels.sparsify_`), whose masks are not fixed; not sharded
            by FSDP2.
        optimizer: trains the model's weights: one of torch's, or of `dst_kernels.optim`.
        dense: names of masked layers, as `sparsity_report` shows them, that keep all weights.
        seed: of the random choices.

    Raises TypeError for the wrong kind of argument; ValueError for numbers out of range, unknown
    names, a model without masked layers or with fixed masks, a weight that the optimizer does not
    train, is computed by a parametrization or sharded.
    """

    dense_gradient: ClassVar[bool] = False
    """Whether weights that are masked out have gradients, too."""

    saved: ClassVar[tuple[str, ...]] = ("steps_done",)
    """The attributes, plain numbers, that the state dict has."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        dense: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        require(isinstance(optimizer, Optimizer), "optimizer", "a torch optimizer", optimizer)
        require(not isinstance(dense, str), "dense", "a collection of names of layers", dense)
        require_integer("seed", seed, 0)
        self.model, self.optimizer, self.seed, self.steps_done = model, optimizer, seed, 0
        layers = self._all_layers()
        names = [part_name for layer in layers for part_name in layer.names]
        unknown = [str(name) for name in dense if name not in names]
        if unknown:
            raise ValueError(
                f"dense: {', '.join(unknown)} is not among the masked layers, which are "
                f"{', '.join(names)}"
            )
        self.layers = [layer for layer in layers if not set(layer.names) & set(dense)]
        if not self.layers:
            raise ValueError("dense: that is all masked layers: a method needs one to prune")
        done: list[MaskedWeight] = []
        try:
            for layer in layers:
                everywhere = torch.ones_like(layer.weight, dtype=torch.bool)
                for part in layer.parts:
                    part.set_fixed_mask(everywhere, self.dense_gradient and layer in self.layers)
                    done.append(part)
        except Exception:
            for part in done:
                part.drop_fixed_mask()
            raise

    def _all_layers(self) -> list[Layer]:
        """Return all masked weights, each once; raise ValueError for those that do not fit."""
        unwrapped_parts(self.model)  # raises for what a fixed mask cannot be set in
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        found: dict[int, Layer] = {}
        for name, part in named_masked_weights(self.model):
            called = name or "the model"
            if part.fixed_mask is not None:
                raise ValueError(
                    f"model: the mask of {called} is fixed: call dst_kernels.unfreeze_masks_ before"
                )
            if is_parametrized(part.module, part.name):
                raise ValueError(f"model: the weight of {called} is computed by a parametrization")
            if is_dtensor(part.weight):
                raise ValueError(f"model: the weight of {called} is sharded")
            if id(part.stored) not in trained:
                raise ValueError(f"optimizer does not train the weight of {called}")
            layer = found.setdefault(id(part.stored), Layer(len(found)))
            layer.names.append(name)
            layer.parts.append(part)
        return [*found.values()]

    def step(self) -> None:
        """Count a step of the optimizer, and change the masks if the rule says so now."""
        self.steps_done += 1
        with torch.no_grad():
            self._after_step()

    def _after_step(self) -> None:
        """Apply the rule after the step `steps_done`, counted from 1."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, beside model and optimizer, to go on bit for bit."""
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the method was that returned this state; raise ValueError for another's."""
        missing = [name for name in self.saved if name not in state]
        if missing:
            raise ValueError(f"state is not that of {type(self).__name__}: no {', '.join(missing)}")
        for name in self.saved:
            setattr(self, name, state[name])

    # -- for the rules -------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, density: float, distribution: str) -> None:
        """Give each layer a random mask; weights that are masked out become 0.

        Check the arguments of a rule before `super().__init__`, which fixes the model's masks.
        """
        counts = layer_counts([layer.shape for layer in self.layers], density, distribution)
        for layer, count in zip(self.layers, counts, strict=True):
            layer.set_mask(random_mask(layer.weight, count, self._generator(layer)))
            layer.weight.mul_(layer.mask)

    def _first_of_period(self, every: int) -> bool:
        """Return whether this is the first step after `every` steps, twice as many, and so on.

        A change that is due after an epoch is made then: at the epoch's end, when a network is
        evaluated or kept, the weights that grew last have trained.
        """
        return self.steps_done > 1 and (self.steps_done - 1) % every == 0

    def _generator(self, layer: Layer | None = None) -> torch.Generator:
        """Return random numbers for this step and layer, the same whenever it is called.

        Those of a layer are drawn on its device; those of no layer on the host.
        """
        device = "cpu" if layer is None else layer.weight.device
        number = hash((self.seed, self.steps_done, -1 if layer is None else layer.index)) % 2**63
        return torch.Generator(device).manual_seed(number)

    def _change(self, layer: Layer, mask: Tensor, *, keep_state: bool = False) -> None:
        """Set a layer's mask. What is pruned or grown becomes 0, and so does its momentum.

        With `keep_state`, what the optimizer knows about a weight stays.
        """
        changed = mask != layer.mask
        layer.weight.masked_fill_(changed, 0)
        if not keep_state:
            for tensor in self._state(layer):
                tensor.masked_fill_(changed, 0)
        layer.set_mask(mask)

    def _regrow(self, layer: Layer, kept: Tensor, free: Tensor, count: int) -> None:
        """Prune what is not `kept`, and grow `count` weights, 0, at random places that are `free`.

        A weight that is pruned and grows again at once starts at 0, too.
        """
        grown = torch.zeros(kept.shape, dtype=torch.bool, device=kept.device)
        grown.view(-1)[random_places(free, count, self._generator(layer))] = True
        self._change(layer, kept)
        self._change(layer, kept | grown)

    def _state(self, layer: Layer) -> list[Tensor]:
        """Return the optimizer's tensors of the weight's shape: momentum and the like."""
        state = self.optimizer.state.get(layer.weight, {})
        return [
            value
            for value in state.values()
            if isinstance(value, Tensor) and value.shape == layer.weight.shape
        ]

    def _gradient(self, layer: Layer) -> Tensor:
        """Return the weight's gradient; raise RuntimeError if it has been dropped."""
        gradient = layer.weight.grad
        if gradient is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the gradient of the weight of "
                f"{layer.names[0] or 'the model'}, which is None: call step() after "
                "optimizer.step() and before zero_grad()"
            )
        return gradient


def require_density(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a number above 0, at most 1."""
    require_number(name, value, positive=True)
    require_share(name, value)


def require_share(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a number from 0 to 1."""
    require_number(name, value)
    if value > 1:  # type: ignore[operator]  # it is a number
        raise ValueError(f"{name} must be at most 1, but is {value}")


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a boolean tensor: True at the `count` largest scores, of ties at any."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen.view(-1)[scores.reshape(-1).topk(count).indices] = True
    return chosen
