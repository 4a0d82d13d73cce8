"""Train masked models with Lightning: `Trainer(callbacks=[DSTCallback(alpha=1e-4)])`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .common import Alpha, add_regularization_, check_alpha, check_training, deferred, figures

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.pytorch import Callback
else:  # the same library under its older name
    from pytorch_lightning import Callback


class DSTCallback(Callback):
    """Add the regulariser once per optimizer step, clip what the step will use, log ratios.

    Build the optimizer in `configure_optimizers` from `dst_kernels.parameter_groups(self, ...)`,
    which keeps weight decay off thresholds, or from DSTSGD or DSTAdamW with this module as model;
    convert in `__init__` or in `configure_model`. `gradient_clip_val` then clips the gradients
    that the step will use, the regulariser's included, under every optimizer. Every
    `log_every_n_steps` steps `remaining_ratio` and `sparse_regularization` are logged.

    Args:
        alpha: factor of the regulariser, or a `dst_kernels.TargetRatio`; None: a DST optimizer has
            it. It may change in training.

    Raises TypeError or ValueError for an alpha that is no number of at least 0. When training
    starts, raises ValueError if there are no masked layers, no alpha or two, an optimizer that does
    not train some threshold, or weight decay on a group of both weights and thresholds.
    """

    def __init__(self, alpha: Alpha = None) -> None:
        check_alpha(alpha)
        self.alpha = alpha

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check model and optimizers, and let Lightning clip what their steps will use."""
        check_training(pl_module, trainer.optimizers, self.alpha, "callback")
        plugin = trainer.precision_plugin
        of_lightning, scaler = plugin.clip_gradients, getattr(plugin, "scaler", None)

        def clip_gradients(optimizer, clip_val=0.0, gradient_clip_algorithm="norm"):
            own = deferred(optimizer)
            if own is None:
                return of_lightning(optimizer, clip_val, gradient_clip_algorithm)
            if gradient_clip_algorithm != "norm":
                raise ValueError(
                    "gradient_clip_algorithm must be 'norm' with a DST optimizer, which makes the "
                    f"gradients of masked weights in its step, but is {gradient_clip_algorithm!r}"
                )
            if clip_val > 0:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                own.clip_grad_norm_(clip_val)

        plugin.clip_gradients = clip_gradients

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give Lightning its own clipping back."""
        vars(trainer.precision_plugin).pop("clip_gradients", None)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the regulariser's gradient: after the last backward of a step, before clipping."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler = None  # Lightning has divided the gradients already
        add_regularization_(pl_module, optimizer, self.alpha, scaler)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log how sparse the model is."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(figures(pl_module))
