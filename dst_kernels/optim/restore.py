"""Put layers that the collapse guard restarts back to their last healthy thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import require_integer
from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor

_HEALTHY = 2  # times reset_ratio: a layer that keeps more is not about to collapse
_JUMP = 5  # times the ratio at the last look: what only the guard leads to
_EASED = 0.9  # of the healthy thresholds: the layer would otherwise collapse again at once


class RestoreCollapsed:
    """Keep a collapsed layer from starting again with all of its weights.

    The method's rule sets the thresholds of a layer to 0 when no more than `reset_ratio` of its
    weights remain, so that its ratio jumps to 1 and falls anew. This notices the jump, and sets the
    thresholds to 0.9 times those with which the layer last kept more than 2 * reset_ratio.

        restore = dst_kernels.optim.RestoreCollapsed(model)
        ...
        optimizer.step()
        restore.step()

    Args:
        model: a model with masked layers, not sharded by FSDP2. Build this before training.
        every: steps between two looks at the ratios. In between, a restarted layer is dense.

    Nothing waits for the device. Costs one more tensor of each threshold's size. Raises ValueError
    if there are no masked layers or `every` is below 1, TypeError for other kinds of arguments,
    RuntimeError if a weight is sharded.
    """

    def __init__(self, model: nn.Module, every: int = 10) -> None:
        require_integer("every", every, 1)
        self.model, self.every, self.steps_done = model, every, 0
        self._healthy: dict[str, Tensor] = {}
        self._ratios: dict[str, Tensor] = {}
        for name, part in named_masked_weights(model):
            if is_dtensor(part.weight):
                raise RuntimeError(f"{name or 'the model'} is sharded: that is not supported")
            self._healthy[name] = part.threshold.detach().clone()
            self._ratios[name] = _ratios(part)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer; look at the layers now and then."""
        self.steps_done += 1
        if self.steps_done % self.every:
            return
        for name, part in named_masked_weights(self.model):
            reset_ratio = part.module.masking.reset_ratio
            if reset_ratio is None or part.fixed_mask is not None:
                continue
            now, before = _ratios(part), self._ratios[name]
            restarted = (before < _JUMP * reset_ratio) & (now > _JUMP * before)
            healthy = (now > _HEALTHY * reset_ratio) & ~restarted
            threshold, kept = part.threshold, self._healthy[name]
            threshold.copy_(torch.where(_spread(restarted, threshold), _EASED * kept, threshold))
            kept.copy_(torch.where(_spread(healthy, threshold), threshold, kept))
            before.copy_(torch.where(restarted, _HEALTHY * reset_ratio, now))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on bit for bit."""
        copies = {
            kind: {name: tensor.clone() for name, tensor in tensors.items()}
            for kind, tensors in (("healthy", self._healthy), ("ratios", self._ratios))
        }
        return {"steps_done": self.steps_done, **copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the one was that returned this state."""
        self.steps_done = state["steps_done"]
        for kind, tensors in (("healthy", self._healthy), ("ratios", self._ratios)):
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])


def _ratios(part: MaskedWeight) -> Tensor:
    """Return the remaining ratio of each matrix that the guard checks by itself."""
    return part.rows(part.mask()).reshape(part.matrices, -1).float().mean(1)


def _spread(flags: Tensor, threshold: Tensor) -> Tensor:
    """Return one flag for each threshold from one for each matrix."""
    return flags.repeat_interleave(threshold.numel() // len(flags)).view(threshold.shape)
