"""Train masked models with transformers' Trainer; load those that `save_pretrained` saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer

from ..model import SparsifyConfig, sparsify_
from ..model.note import NOTE
from ..model.planning import FilterFn
from ..nn import MaskedModule
from ..nn.find import named_masked_weights
from ..nn.in_place import reading_class
from ..nn.weight import is_of_mask
from .accelerate import install_clipping_
from .common import Alpha, add_regularization_, check_alpha, check_training, figures


class DSTTrainerMixin:
    """Make any `Trainer` train masked models: `class Mine(DSTTrainerMixin, Seq2SeqTrainer)`.

    The regulariser's gradient is added once per optimizer step, whatever `compute_loss` does and
    however many batches are accumulated; the logged loss is without it. The Trainer's own optimizer
    has no weight decay on thresholds. `max_grad_norm` clips the gradients that the step will use,
    with DSTSGD and DSTAdamW too (`optimizers=(DSTAdamW(model, ...), None)`). Training logs have
    `remaining_ratio` and `sparse_regularization`.

    Args:
        alpha: factor of the regulariser, or a `dst_kernels.TargetRatio`; None: a DST optimizer has
            it. All other arguments are the Trainer's.

    Raises TypeError or ValueError for an alpha that is no number of at least 0. When the optimizer
    is made, raises ValueError if there are no masked layers, no alpha or two, an optimizer that
    does not train some threshold, or weight decay on a group of both weights and thresholds;
    RuntimeError under DeepSpeed, which hides the gradients.
    """

    model: Any
    optimizer: Any
    accelerator: Any

    def __init__(self, *args: Any, alpha: Alpha = None, **kwargs: Any) -> None:
        check_alpha(alpha)
        self.alpha = alpha
        super().__init__(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of what the Trainer decays, without thresholds."""
        thresholds = {id(part.threshold) for _, part in named_masked_weights(model)}
        left_out = {name for name, p in model.named_parameters() if id(p) in thresholds}
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if name not in left_out]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer, after the checks, and let the Trainer clip what it will use."""
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise RuntimeError("DeepSpeed hides the gradients that alpha is added to: use FSDP2")
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        check_training(self.model, [optimizer], self.alpha, "trainer")
        install_clipping_(self.accelerator, optimizer)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the Trainer does; before an optimizer step, add the regulariser's gradient."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            add_regularization_(self.model, self.optimizer, self.alpha, scaler)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; with a training loss, also log how sparse the model is."""
        if "loss" in logs:
            found = {name: value.item() for name, value in figures(self.model).items()}
            logs = {**logs, **found}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class DSTTrainer(DSTTrainerMixin, Trainer):
    """Train a masked model with transformers' Trainer and one more argument: `alpha`."""


def from_pretrained(
    model_class: Any,
    path: str,
    *args: Any,
    sparsify: SparsifyConfig | None = None,
    filter_fn: FilterFn | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Return `model_class.from_pretrained(path, ...)` as a masked model, with its thresholds.

    `sparsify_` notes in a model's config what it has masked and how, and `save_pretrained` writes
    that to config.json; this function reads it. Thresholds that the checkpoint lacks are zeros, so
    a dense checkpoint gives what `sparsify_` would. Weights that are tied share their threshold.
    Masks that were fixed (`freeze_masks_`) are fixed again.

    Args:
        model_class: a model's class or one of the `Auto` classes.
        path, args, kwargs: as for its `from_pretrained`.
        sparsify, filter_fn: as for `dst_kernels.sparsify_`; needed if config.json has no note.

    Raises ValueError if there is neither a note nor `sparsify`, or if the checkpoint has thresholds
    or fixed masks for weights that the model does not mask.
    """
    hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "subfolder") if k in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **hub)
    note = getattr(config, NOTE, None)
    if sparsify is None:
        if note is None:
            raise ValueError(
                f"sparsify: config.json of {path} does not say how the model was masked: give the "
                "SparsifyConfig"
            )
        # The note's list of modules already leaves out what these options skipped.
        sparsify = dataclasses.replace(
            SparsifyConfig.from_dict(note["config"]), skip_first=False, skip_last=False
        )
        if filter_fn is None:
            masked = set(note["modules"])

            def filter_fn(module, name):
                return name in masked

    if not issubclass(model_class, PreTrainedModel):
        with torch.device("meta"):
            model_class = type(model_class.from_config(config))

    fixed: set[str] = set()

    def build(self, *args, **kwargs):
        model_class.__init__(self, *args, **kwargs)
        sparsify_(self, sparsify, filter_fn)
        for name, module in self.named_modules():
            for part in module.masked_weights() if isinstance(module, MaskedModule) else ():
                if f"{name}.{part.fixed_mask_name}".lstrip(".") in fixed:
                    part.set_fixed_mask(torch.ones_like(part.weight, dtype=torch.bool))

    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    loading: Any = type(model_class.__name__, (model_class,), {**names, "__init__": build})
    kwargs["output_loading_info"] = True
    model, info = loading.from_pretrained(path, *args, config=config, **kwargs)
    fixed.update(key for key in info["unexpected_keys"] if is_of_mask(key, "fixed_mask"))
    if fixed:  # load again: only the checkpoint says which masks are fixed
        model, info = loading.from_pretrained(path, *args, config=config, **kwargs)
    lost = sorted(key for key in info["unexpected_keys"] if is_of_mask(key))
    if lost:
        raise ValueError(
            f"sparsify: the checkpoint's {lost[0]} ({len(lost)} such) has no place in this model: "
            "give the SparsifyConfig and filter_fn that it was made with"
        )
    model.__class__ = model_class if type(model) is loading else reading_class(model_class)
    _tie_thresholds_(model, set(info["missing_keys"]))
    return model


def _tie_thresholds_(model: nn.Module, missing: set[str]) -> None:
    """Let weights that are tied by loading share the threshold that was loaded."""
    names = {module: name for name, module in model.named_modules()}
    by_weight: dict[int, list] = {}
    for _, part in named_masked_weights(model):
        by_weight.setdefault(id(part.stored), []).append(part)
    for parts in by_weight.values():
        keys = [f"{names[part.module]}.{part.threshold_name}".lstrip(".") for part in parts]
        loaded = [part for part, key in zip(parts, keys, strict=True) if key not in missing]
        for part in parts:
            setattr(part.module, part.threshold_name, (loaded or parts)[0].threshold)
