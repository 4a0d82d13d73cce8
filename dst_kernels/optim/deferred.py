"""Implement what DSTSGD and DSTAdamW share: the choice of layers, the step, its state, clipping."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require, require_flag, require_module, require_number
from ..backends import implementation, resolve
from ..model import parameter_groups
from ..nn import MaskedLayer
from ..nn.find import named_masked_weights
from ..nn.sources import Deferral
from ..nn.switches import group_, is_grouped
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor, norm_over_shards
from ._batch import Batch, Segment, collect, local, on_device
from ._pairs import Pair, deferrable_pairs, receivers
from .target import TargetRatio


class DeferredOptimizer(Optimizer):
    """Compute dW and dt of masked layers inside the optimizer's step; see `DSTSGD`.

    Subclasses define `_op`, the op's name, and `_kinds`, the number of state tensors it takes for
    each parameter.
    """

    _step_supports_amp_scaling = True  # GradScaler then passes its scale without a synchronisation
    _op: str
    _kinds: int

    _deferral: Deferral
    _pairs: list[Pair]
    _layers: list[MaskedLayer]  # of the pairs
    _segments: list[Segment]
    _tensors: list[Tensor]  # the segments' parameters and thresholds
    _receiving: list[int]  # segments whose gradients may be of kept weights alone
    _masked: list[MaskedWeight]  # whose thresholds are segments by themselves
    _groups: list[list[int]] | None  # ids by param group, when the segments were collected
    _signature: list[Any] | None  # of the step for which the batches were collected

    def __init__(
        self,
        model: nn.Module,
        params: Iterable | None,
        defaults: dict[str, Any],
        bucket_mb: float,
        backend: str,
    ) -> None:
        require_module(model)
        require(
            params is None or isinstance(params, Iterable),
            "params", "parameters, param groups or None (the model's)", params,
        )  # fmt: skip
        require_number("bucket_mb", bucket_mb, positive=True)
        if backend == "triton":
            raise ValueError(
                "backend must be one of auto, reference, cpu, cuda, but is 'triton', "
                "which has no kernels for steps"
            )
        resolve(backend)
        self._model, self._backend = model, backend
        self._clip: Tensor | None = None
        self._controllers: set[TargetRatio] = set()
        super().__init__(parameter_groups(model) if params is None else params, defaults)
        self.defaults = self._steered(defaults)
        if not is_grouped(model):
            group_(model, bucket_mb)
        self._defer()

    # -- the step ------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters from `.grad`, without a synchronisation; return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales = getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self._clip
        hypers, rates, alphas = self._hypers()
        batches = self._current_batches()
        for batch in batches:
            grads, threshold_grads = batch.grads()
            weights, state = batch.read()
            masked = self._deferral.fresh(batch.layers)
            may_skip = scales[1] is not None
            rows = {layer: each.targets(may_skip) for layer, each in masked.items()}
            self._implementation(self._op, batch)(
                weights, grads, *state,
                batch.thresholds, threshold_grads, *batch.threshold_state,
                batch.placed(masked, rows),
                batch.kept, batch.settings,
                hypers, *map(batch.present, (rates, alphas, scales)),
            )  # fmt: skip
            written = [each.tensor for each in masked.values()]
            written += [tensor for each in rows.values() if each is not None for tensor in each]
            torch.autograd.graph.increment_version([*batch.written, *written])
            batch.write(weights, state)
            self._deferral.renewed(masked)
            for layer, kept in batch.counted(masked, may_skip).items():
                masked[layer].made_by_step(kept, rows[layer])
        if self._deferral.prepared is not None:
            self._deferral.prepared.renew()
        if any(batch.first for batch in batches):
            self._first_step_done(scales[1])
            self._signature = None
        self._clip = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and the factor of `clip_grad_norm_` with them."""
        super().zero_grad(set_to_none)
        self._clip = None

    def refresh(self) -> None:
        """Make the next training forward mask all weights again.

        Call it after weights or thresholds were written in a way that PyTorch does not record:
        through `.data`, or from outside PyTorch. Forwards in evaluation mode or without gradients
        always mask again.
        """
        self._deferral.refresh()

    def grad_norm(self) -> Tensor:
        """Return the norm of all gradients that the next step will use, as a 0-dim tensor.

        It differs from the norm of `.grad`, which holds dense gradients G in place of dW and dt.
        This takes one more pass over gradients and weights, but no synchronisation.
        """
        hypers, _, alphas = self._hypers()
        norms = []
        with torch.no_grad():
            for batch in self._current_batches():
                grads, threshold_grads = batch.grads()
                norm = torch.zeros(1, dtype=torch.float32, device=batch.device)
                self._implementation("grad_norm_", batch)(
                    batch.read()[0], grads, batch.thresholds, threshold_grads, batch.settings,
                    hypers, batch.present(alphas), [], norm,
                )  # fmt: skip
                norms.append(norm_over_shards(norm, batch.segments[0].parameter))
        if not norms:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return torch.cat([norm.to(norms[0].device) for norm in norms]).norm()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of the next step to a norm of at most `max_norm`.

        Return the norm before that. Use it in place of `torch.nn.utils.clip_grad_norm_`, which
        would measure the dense gradients. With a GradScaler call its `unscale_` first. `.grad`
        stays unchanged. Squares are added in float64; norm and factor are float32 numbers, beside
        float64 parameters, too.
        """
        number = isinstance(max_norm, (Real, Tensor))
        require(number, "max_norm", "a number of at least 0 (infinite: only measure)", max_norm)
        if isinstance(max_norm, Real) and not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, but is {max_norm}")
        norm = self.grad_norm()
        self._clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    # -- whose gradients -----------------------------------------------------------------------

    def _defer(self) -> None:
        """Take over the gradients of all layers that allow it, and only of these."""
        before: Deferral | None = getattr(self, "_deferral", None)
        optimized = {id(p) for group in self.param_groups for p in group["params"]}
        pairs = deferrable_pairs(self._model, optimized)
        layers = [layer for pair in pairs for layer in pair.layers]
        taken = sum(layer._deferral not in (None, before) for layer in layers)
        if taken:
            raise ValueError(
                f"model: {taken} of its layers belong to another optimizer of dst_kernels.optim; "
                "call its release() first"
            )
        self._deferral = Deferral(layers, receivers(self._model, optimized))
        self._pairs = pairs
        self._deferral.regularizes = self._regularizes()
        weakref.finalize(self, self._deferral.release).atexit = False
        if before is not None:
            before.release()  # the layers that are not in the new one
        self._forget()

    def _regularizes(self) -> bool:
        """Return whether some group has an alpha; a tensor counts whatever its value."""
        alphas = [group["alpha"] for group in self.param_groups]
        return any([isinstance(alpha, Tensor) or bool(alpha) for alpha in alphas])

    def _let_go(self) -> None:
        """Release layers whose gradients can no longer be deferred, such as parametrized ones."""
        if all(map(self._deferral.serves, self._layers)):
            return
        served = [p for p in self._pairs if all(map(self._deferral.serves, p.layers))]
        kept = {layer for pair in served for layer in pair.layers}
        self._deferral.release(set(self._layers) - kept)
        self._pairs = served
        self._forget()

    def release(self) -> None:
        """Let the layers compute dW and dt in their backward again, for any optimizer to use.

        Dense gradients that no step has used yet are dropped.
        """
        self._deferral.release()
        self._pairs = []
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, and take over the layers whose weights are in it."""
        if isinstance(param_group, dict):  # otherwise torch raises its own error
            self._check({**self.defaults, **param_group})
            param_group = self._steered({"alpha": self.defaults["alpha"], **param_group})
        super().add_param_group(param_group)
        if not hasattr(self, "_deferral"):  # still in the constructor
            return
        try:
            self._defer()
        except ValueError:
            self.param_groups.pop()
            raise

    def _steered(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return options with the tensor of a TargetRatio that is their alpha, and follow it."""
        controller = options["alpha"]
        if not isinstance(controller, TargetRatio):
            return options
        if controller not in self._controllers:
            self._controllers.add(controller)
            controller.follow(self)
        return {**options, "alpha": controller.alpha}

    def _implementation(self, op: str, batch: Batch) -> Callable:
        return implementation(self._backend, batch.device, op, double=batch.double)

    # -- collecting what the op takes ----------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was collected for the last step."""
        self._groups = self._signature = None
        self._layers = [layer for pair in self._pairs for layer in pair.layers]
        self._batches: list[Batch] = []
        self._rows: tuple[list[list[float]], Tensor] | None = None  # what `_hypers` made last

    def _hypers(self) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """Return hypers, rates and alphas: two rows per group, for weights and for thresholds."""
        rows: list[list[float]] = []
        rates: list[Tensor | None] = []
        alphas: list[Tensor | None] = []
        for group in self.param_groups:
            rate, alpha = on_device(group["lr"]), on_device(group["alpha"])
            common = [
                float(group["lr"]) if rate is None else 0.0,
                group["weight_decay"],
                float(group["maximize"]),
            ]
            amount = 0.0 if group["alpha"] is None or alpha is not None else float(group["alpha"])
            has_alpha = float(group["alpha"] is not None)
            rest = self._rule(group)
            rows += [*common, 0.0, 0.0, *rest], [*common, has_alpha, amount, *rest]
            rates += rate, rate
            alphas += None, alpha
        self._deferral.regularizes = self._regularizes()
        if self._rows is None or self._rows[0] != rows:
            self._rows = rows, torch.tensor(rows, dtype=torch.float64, device="cpu")
        return self._rows[1], rates, alphas

    def _all_segments(self) -> list[Segment]:
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        pairs = {id(pair.weight): pair for pair in self._pairs}
        deferred = {id(pair.threshold) for pair in self._pairs}
        masked: dict[int, list[MaskedWeight]] = {}
        for _, part in named_masked_weights(self._model):
            masked.setdefault(id(part.threshold), []).append(part)
        segments = []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                pair = pairs.get(id(p))
                if pair is not None:
                    of_threshold = group_of.get(id(pair.threshold))
                    row = -1 if of_threshold is None else 2 * of_threshold + 1
                    segments.append(Segment(p, 2 * i, pair, row))
                elif id(p) not in deferred:
                    of = masked.get(id(p), ())
                    receives = id(p) in self._deferral.receivers
                    segments.append(Segment(p, 2 * i + bool(of), masked=of, receives=receives))
        return segments

    def _current_batches(self) -> list[Batch]:
        """Return this step's batches; collect them again only if more than values has changed."""
        self._let_go()
        self._commit_resets()
        groups = [[*map(id, group["params"])] for group in self.param_groups]
        if groups != self._groups:
            self._groups, self._signature = groups, None
            self._segments = self._all_segments()
            pairs = [segment.pair for segment in self._segments if segment.pair is not None]
            self._tensors = [segment.parameter for segment in self._segments]
            self._tensors += [pair.threshold for pair in pairs]
            self._masked = [part for segment in self._segments for part in segment.masked]
            self._receiving = [i for i, each in enumerate(self._segments) if each.receives]
            self._sharded = any(map(is_dtensor, self._tensors))
        has_alpha = [
            flag for group in self.param_groups for flag in (False, group["alpha"] is not None)
        ]
        fixed = {
            i: mask
            for i in self._receiving
            if (mask := self._deferral.kept_of(self._segments[i].parameter)) is not None
        }
        own = [*map(local, self._tensors)] if self._sharded else self._tensors
        signature: list[Any] = [
            has_alpha,
            [*map(self._needs_state, self.param_groups)],
            [tensor.grad is None for tensor in self._tensors],
            [tensor.requires_grad for tensor in self._tensors],
            [tensor.data_ptr() for tensor in own],
            [part.frozen for part in self._masked],
            [layer.masking for layer in self._layers],
            fixed,
        ]
        if [len(self.state), *signature] != self._signature:
            self._batches = collect(self._segments, has_alpha, self._state_of, self._kinds, fixed)
            self._signature = [len(self.state), *signature]
        return self._batches

    def _commit_resets(self) -> None:
        """Write the guard's resets into thresholds, which forwards in evaluation mode do not."""
        for pair in self._pairs:
            layer = pair.layers[0]
            if pair.weight.grad is not None and not layer._sharded_thresholds:
                self._deferral.commit(layer)

    # -- state ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the optimizer of `torch.optim` it replaces."""
        known = isinstance(state_dict, dict) and "param_groups" in state_dict
        require(known, "state_dict", "a dict, as an optimizer's state_dict() makes it", state_dict)
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group})
        old = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, old, strict=True):
            group.update({**before, **group})  # torch.optim lacks some of our options
            for name in ("lr", "alpha"):  # whoever changes a tensor goes on with the same one
                mine, given = before[name], group[name]
                if isinstance(mine, Tensor) and mine is not given:
                    group[name] = mine.copy_(given) if isinstance(given, Tensor) else given
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the model, without which a copy could compute no gradients."""
        return {**super().__getstate__(), "_model": self._model, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:  # otherwise load_state_dict calls this
            self._clip, self._controllers = None, set()
            self._defer()

    def _check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for what an option of a group cannot be."""
        for name in ("lr", "alpha"):
            value = group[name]
            if isinstance(value, TargetRatio) and name == "alpha":
                continue
            if isinstance(value, Tensor):
                require(value.numel() == 1, name, "a number or a tensor with one element", value)
            elif value is not None or name == "lr":
                require_number(name, value)
        require_number("weight_decay", group["weight_decay"])
        require_flag("maximize", group["maximize"])

    def _rule(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """Return the last three columns of the op's hypers."""
        raise NotImplementedError

    def _needs_state(self, group: dict[str, Any]) -> bool:
        """Return whether the update rule keeps state with these options."""
        return True

    def _state_of(self, parameter: Tensor, row: int) -> tuple[list[Tensor], bool]:
        """Return a parameter's state tensors, and whether a first step with its own rule is due."""
        raise NotImplementedError

    def _like_parameter(self, parameter: Tensor, name: str) -> Tensor:
        """Return state `name` with the parameter's dtype and strides, which conversions change."""
        state = self.state[parameter]
        tensor = state[name]
        strides = local(tensor).stride(), local(parameter).stride()
        if tensor.dtype != parameter.dtype or strides[0] != strides[1]:
            tensor = state[name] = torch.empty_like(parameter).copy_(tensor)
        return tensor

    def _first_step_done(self, found_inf: Tensor | None) -> None:
        """Act after a step that was a parameter's first, unless a GradScaler skipped it."""
