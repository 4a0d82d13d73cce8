"""Steer the regulariser's alpha so that the remaining ratio becomes what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require, require_flag, require_integer, require_number
from ..model import freeze_masks_
from ..model.report import kept_counts, ratio_of
from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ._batch import local

SCHEDULES = ("cubic", "linear")
_LOOKS = 200  # at least so many over a ramp, if it has as many steps
_MOST_STEPS = 10  # between two looks
_AHEAD = 10  # looks until the ratio should be on the ramp again
_FIRST, _LEAST, _MOST = 1e-7, 1e-10, 1e3  # of alpha
_GAIN = 0.3  # of one look: the share of an error in pace, in logarithms, that alpha takes
_NOISE = 1e-6  # a pace of log(ratio) that counts as none
_FLOOR = 2.0  # times reset_ratio: a matrix that keeps fewer would soon set off the guard
_EASED = 0.9  # of its thresholds, at each look, until it keeps more
_KEY = "target_ratios"  # in the state dict of an optimizer


class TargetRatio:
    """Find the alpha with which `target` of the masked weights remain after `steps` steps.

    Over the steps the wanted ratio falls from 1 to `target`, linearly or as the cubic schedule of
    Zhu and Gupta (2017) does, target + (1 - target) (1 - step / steps)^3. Every few steps the
    controller compares the pace at which log(ratio) falls with the pace that would bring it onto
    that ramp, and multiplies alpha with a power of their quotient. So it needs no starting value:
    alpha finds its order of magnitude, whatever the learning rate, the optimizer and the loss.

    A matrix that keeps fewer than twice what would set off the collapse guard is held: each look
    lowers its thresholds by a tenth. Its restart would throw the ratio far off the ramp.

    At the ramp's end the ratio is settled: all thresholds move by one multiple of their weight's
    standard deviation, the quantile that leaves `target` of all weights. What training has found
    out about layers and rows stays. Then masks are fixed (`freeze_masks_`), and weights train on;
    or, without `freeze`, thresholds go on and alpha holds the ratio near `target`.

        controller = dst_kernels.TargetRatio(model, target=0.05, steps=10_000)
        optimizer = dst_kernels.optim.DSTSGD(model, lr=0.1, alpha=controller)

    DST optimizers and the integrations take it in place of alpha, and call `step`. In a loop of
    your own, add `controller.alpha * sparse_regularization(model)` to the loss and call
    `controller.step()` after each step of the optimizer. Give several controllers parts of a model,
    and each its param group, for a target per part. Nothing waits for the device, and a captured
    CUDA graph reads alpha there: call `step` outside the capture.

    Args:
        model: a model with masked layers, or a part of one; not a DistributedDataParallel, if masks
            are to be fixed. A `reset_ratio` above target / 10 is lowered to that, in place: the
            collapse guard would restart layers that end far sparser than the whole.
        target: the share of the masked weights to keep, above 0, below 1.
        steps: optimizer steps of the ramp.
        schedule: "cubic" or "linear".
        freeze: whether to fix the masks at the ramp's end.

    `alpha`: a 0-dim float32 tensor on the model's device, changed in place. `steps_done`: calls of
    `step`. With FSDP2, `step` is a collective call. All ranks of a DDP run get the same alpha.

    Raises ValueError for numbers out of range, an unknown schedule, a model without masked layers
    or with fixed masks; TypeError for other kinds of arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        steps: int,
        *,
        schedule: str = "cubic",
        freeze: bool = True,
    ) -> None:
        require_number("target", target, positive=True)
        if target >= 1:
            raise ValueError(f"target must be below 1, but is {target}")
        require_integer("steps", steps, 1)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, but is {schedule!r}")
        require_flag("freeze", freeze)
        self.model, self.target, self.steps = model, target, steps
        self.schedule, self.freeze = schedule, freeze
        parts = self._parts()
        if any(part.fixed_mask is not None for part in parts):
            raise ValueError(
                "model: masks are fixed, whatever alpha is: call dst_kernels.unfreeze_masks_ before"
            )
        for part in parts:
            ratio = part.module.masking.reset_ratio
            if ratio is not None and ratio > target / 10:
                part.module.reset_ratio = target / 10
        device = parts[0].weight.device
        self.steps_done = 0
        self.alpha = torch.full((), _FIRST, device=device)
        self._pace = torch.zeros((), device=device)  # by which log(ratio) falls from look to look
        self._before = torch.zeros((), device=device)  # log(ratio) at the last look
        self._every = max(1, min(_MOST_STEPS, steps // _LOOKS))
        self._hooks: list[Any] = []

    def wanted(self, step: int) -> float:
        """Return the ratio that is wanted after so many steps."""
        left = max(0.0, 1 - step / self.steps)
        return self.target + (1 - self.target) * (left**3 if self.schedule == "cubic" else left)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer; look at the ratio now and then, settle it at the end."""
        self.steps_done += 1
        if self.steps_done == self.steps:
            self._settle()
            if self.freeze:
                freeze_masks_(self.model)
                self.alpha.zero_()
        elif self.steps_done % self._every == 0 and not (self.freeze and self.settled):
            self._steer()

    @property
    def settled(self) -> bool:
        """Return whether the ramp is over."""
        return self.steps_done >= self.steps

    def follow(self, optimizer: Optimizer) -> None:
        """Call `step` after each step of this optimizer, and keep the state in its state dict.

        DST optimizers and the integrations do that for you.
        """
        require(isinstance(optimizer, Optimizer), "optimizer", "a torch optimizer", optimizer)
        for hook in self._hooks:
            hook.remove()  # of an optimizer before
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self.step()),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state.setdefault(_KEY, []).append(self.state_dict())

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Take the first state that is left, in the order in which `_save` was called."""
        mine, *others = state.get(_KEY, [None])
        if mine is not None:
            self.load_state_dict(mine)
        rest = {key: value for key, value in state.items() if key != _KEY}
        return {**rest, _KEY: others} if others else rest

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on bit for bit: steps, and 0-dim tensors."""
        return {
            "steps_done": self.steps_done,
            "alpha": self.alpha.clone(),
            "pace": self._pace.clone(),
            "before": self._before.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the controller was that returned this state."""
        self.steps_done = state["steps_done"]
        self.alpha.copy_(state["alpha"])
        self._pace.copy_(state["pace"])
        self._before.copy_(state["before"])

    def _parts(self) -> list[MaskedWeight]:
        """Return the masked weights; of those that share one, the first."""
        found = {id(part.threshold): part for _, part in reversed(named_masked_weights(self.model))}
        return [*found.values()][::-1]

    def _steer(self) -> None:
        counts = kept_counts(self.model)
        for part, kept in counts:
            _hold(part, kept)
        now = ratio_of(counts).clamp(min=1e-9).log()
        self._pace.lerp_(self._before - now, _GAIN)
        self._before.copy_(now)
        then = self.wanted(self.steps_done + _AHEAD * self._every)
        needed = (now - math.log(then)) / _AHEAD
        quotient = (needed.clamp(min=0) + _NOISE) / (self._pace.clamp(min=0) + _NOISE)
        # Momentum delays what alpha does; larger changes would overshoot.
        self.alpha.mul_(quotient.clamp(0.1, 10).pow(_GAIN).clamp(0.5, 1.5)).clamp_(_LEAST, _MOST)

    def _settle(self) -> None:
        """Move all thresholds so that exactly the target remains, but for ties.

        A matrix of which the guard would then keep everything, or of which nothing would be left,
        moves less: it keeps just enough, and the others make up for it.
        """
        parts = self._parts()
        moves = []  # of each part: margins [matrices, n], largest offsets, deviations [matrices]
        for part in parts:
            weight, threshold = part.effective()
            threshold = part.each_row(threshold).float()
            if threshold.shape != weight.shape:
                threshold = threshold.view(-1, *[1] * (weight.dim() - 1))
            margins = (weight.abs() - threshold).reshape(part.matrices, -1).to(self.alpha.device)
            matrices = weight.float().reshape(part.matrices, -1).to(self.alpha.device)
            deviations = matrices.std(1, correction=0).clamp(min=1e-30)
            margins = (margins / deviations[:, None]).nan_to_num_(nan=torch.inf)
            size = margins.shape[1]
            least = int((part.module.masking.reset_ratio or 0) * size) + 1
            largest = _above(margins, max(size - least, 1))
            moves.append((margins, largest, deviations))
        pool = torch.cat(
            [m.masked_fill(m > largest[:, None], torch.inf).flatten() for m, largest, _ in moves]
        )
        gone = pool.numel() - round(self.target * pool.numel())
        if gone == 0:
            return
        offset = _above(pool, gone)
        for part, (_, largest, deviations) in zip(parts, moves, strict=True):
            _each(part, torch.minimum(offset, largest) * deviations, Tensor.add_)


def _above(values: Tensor, k: int) -> Tensor:
    """Return the middle between the k-th smallest value of each row [..., n] and the next larger.

    At the k-th value itself rounding would decide whether its weight stays.
    """
    kth = values.kthvalue(k, dim=-1).values
    larger = values.masked_fill(values <= kth[..., None], torch.inf).amin(-1)
    return torch.where(larger.isinf(), kth, kth + (larger - kth) / 2)


def _hold(part: MaskedWeight, kept: Tensor) -> None:
    """Lower the thresholds of a matrix that keeps too few for the guard to leave it alone.

    Were it to restart with all its weights, alpha would answer a jump that thresholds cause.
    """
    reset_ratio = part.module.masking.reset_ratio
    if reset_ratio is None:
        return
    least = _FLOOR * reset_ratio * (part.weight.numel() / part.matrices)
    _each(part, torch.where(kept < least, _EASED, 1.0), Tensor.mul_)


def _each(part: MaskedWeight, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change the thresholds of each matrix, in place, by its value of `values` [matrices]."""
    threshold = local(part.threshold)
    if part.matrices > 1:
        values = values.repeat_interleave(part.threshold.numel() // part.matrices)
        values = values.view(part.threshold.shape)
    change(threshold, values.to(threshold.device))
