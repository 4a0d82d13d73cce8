"""The deferred optimizer steps, as `reference.step` states them: the libraries' ops themselves."""

from __future__ import annotations

import torch

_ops = torch.ops.dst_kernels_compiled
adamw_step_ = _ops.adamw_step.default
grad_norm_ = _ops.grad_norm.default
sgd_step_ = _ops.sgd_step.default
