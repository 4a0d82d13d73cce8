"""Offer SGD that computes the gradients of masked weights and thresholds in its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import require_flag, require_number
from .deferred import DeferredOptimizer
from .target import TargetRatio


class DSTSGD(DeferredOptimizer):
    """Optimize a model with masked layers as `torch.optim.SGD`, with dW and dt made in the step.

    Backward stores the dense gradient G = dL/d(W * M) in the `.grad` of a masked weight, in the
    dtype of the product (a sum over several backwards in that of the weight), and nothing in the
    `.grad` of its threshold. Accumulation, averaging over ranks and unscaling act on G. `step()`
    then reads every weight once: it computes dW and dt, adds the regulariser's gradient, updates t
    and W, applies the collapse guard and writes the masked weight for the next forward. The
    trajectory equals that of `torch.optim.SGD` with dW and dt up to rounding; the one difference
    is that the guard also checks layers which the forward did not use.

        optimizer = dst_kernels.optim.DSTSGD(model, lr=0.1, momentum=0.9, alpha=1e-4)
        loss_fn(model(input), target).backward()
        optimizer.step()

    Do not change weights or thresholds between a forward and its step, and let no other term of the
    loss use a masked weight directly: its gradient would pass through the mask (decay is
    `weight_decay`; for an L1 term see docs/frameworks.md). At other times change them in place only
    under `torch.no_grad()`: writes through `.data` go unnoticed (see `refresh`). Layers with
    another granularity than "row", weights that dense layers use too, weights outside `params` and
    parameters that are replaced (`functional_call`, a parametrization) compute dW and dt in their
    backward; the step uses these as any optimizer does. Layers that FSDP2 shards, and compiled
    ones, mask their weight in the forward.

    Under a fixed mask a weight trains like any other parameter. Where its layer, linear or a
    convolution, computes with kept weights alone (path "sparse"), the step touches no others, nor
    their state: `.grad` is a sparse COO tensor of the kept weights, as long as nothing but the
    layer reads the weight, it has no hooks, and the model is not in DistributedDataParallel (where
    this torch has no norms of sparse tensors, it is dense, too).

    `release()`, or deleting this optimizer, makes all layers usable by other optimizers.

    Args:
        model: the model with the masked layers. Call this very module: its hooks attach the masked
            weights (see `dst_kernels.group_`, which is called here unless it was before).
        params: parameters or param groups as for any optimizer; None:
            `dst_kernels.parameter_groups(model)`, which excludes thresholds from weight decay.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`, in
            every group. `lr` may be a tensor on the device.
        alpha: factor of the sparse regulariser, whose gradient is added to that of every threshold
            in the group; None: no regulariser. A tensor on the device is read there, in every step;
            a `dst_kernels.TargetRatio` steers it and counts the steps.
            The loss must then not contain `sparse_regularization` as well.
        bucket_mb: see `dst_kernels.group_`.
        backend: "auto", "reference", "cpu" or "cuda"; see `dst_kernels.nn.MaskedLinear`.

    The state dict is interchangeable with that of `torch.optim.SGD` over the same groups. A
    GradScaler works as with fused optimizers. Float16 products leave float32 gradients, because
    torch's GradScaler does not unscale float16 ones; so do models in DistributedDataParallel.

    Raises:
        ValueError: numbers out of range, no parameters, no masked layers, layers that belong to
            another optimizer of this kind; a loaded state with options that are not supported.
        TypeError: `model` is not a module, `params` is not iterable, an option is no number.
        RuntimeError: sparse gradients; a backend asked for by name that is not available.
    """

    _op, _kinds = "sgd_step_", 1

    def __init__(
        self,
        model: nn.Module,
        params: Iterable | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        alpha: float | Tensor | TargetRatio | None = None,
        maximize: bool = False,
        bucket_mb: float = 25,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "alpha": alpha,
        }  # fmt: skip
        self._check(defaults)
        super().__init__(model, params, defaults, bucket_mb, backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        require_number("momentum", group["momentum"])
        require_number("dampening", group["dampening"])
        require_flag("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs momentum above 0 and dampening 0, but they are "
                f"{group['momentum']} and {group['dampening']}"
            )

    def _rule(self, group: dict[str, Any]) -> tuple[float, float, float]:
        return group["momentum"], group["dampening"], float(group["nesterov"])

    def _needs_state(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _state_of(self, parameter: Tensor, row: int) -> tuple[list[Tensor], bool]:
        if not self._needs_state(self.param_groups[row // 2]):
            return [], False
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            self._empty.add(parameter)
        return [self._like_parameter(parameter, "momentum_buffer")], parameter in self._empty

    def _first_step_done(self, found_inf: Tensor | None) -> None:
        dampened = any(group["dampening"] for group in self.param_groups)
        if found_inf is None or not dampened or not found_inf.item():  # else it was skipped
            self._empty.clear()

    def _forget(self) -> None:
        super()._forget()
        # Parameters whose momentum buffer is still empty: their first step has no dampening.
        self._empty: set[Tensor] = set()
