"""Offer the deferred optimizer steps that `reference.step` specifies: the libraries' own ops."""

from __future__ import annotations

import torch

_ops = torch.ops.dst_kernels_compiled
adamw_step_ = _ops.adamw_step.default
grad_norm_ = _ops.grad_norm.default
sgd_step_ = _ops.sgd_step.default
