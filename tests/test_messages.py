"""Plausible wrong arguments of public functions: each is refused in words that help."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import dst_kernels as d
from dst_kernels import functional as F
from dst_kernels.nn import MaskedConv2d, MaskedLinear, MaskedLSTM, mask_parameter_
from dst_kernels.optim import DSTSGD, DSTAdamW

W, T, X = torch.ones(4, 3), torch.zeros(4), torch.ones(2, 3)
IMAGE, FILTERS = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 1, 1)
SPARSE = W.to_sparse()
DTYPES = "float16, bfloat16, float32 or float64"
PARAMETERS = list(MaskedLinear(3, 4).parameters())


def model():
    return nn.Sequential(MaskedLinear(3, 4), nn.ReLU(), MaskedLinear(4, 2))


def dense():
    return nn.Sequential(nn.Linear(3, 4))


def entered(model):
    with d.weights_unchanged(model):
        pass


def group(optimizer, **options):
    """Options that stand in a param group."""
    made = model()
    return optimizer(made, [{"params": made.parameters(), **options}])


OF_MODELS = {
    "sparsify_": d.sparsify_, "plan_sparsify": d.plan_sparsify, "finalize_": d.finalize_,
    "densify_": d.densify_, "sparsity_report": d.sparsity_report, "group_": d.group_,
    "remaining_ratio": d.remaining_ratio, "parameter_groups": d.parameter_groups,
    "sparse_regularization": d.sparse_regularization, "check_masks": d.check_masks,
    "ungroup_": d.ungroup_, "weights_unchanged": entered, "DSTSGD": DSTSGD, "DSTAdamW": DSTAdamW,
}  # fmt: skip
NO_MODELS = (
    (None, "None"), ("x", "'x'"), (PARAMETERS[0], "a tensor of shape [4, 3]"),
    ((p for p in PARAMETERS), "a generator"), (nn.Linear, "the class Linear"),
)  # fmt: skip


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_is_no_model(name):
    for value, described in NO_MODELS:
        message = f"model must be a torch.nn.Module, but is {described}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            OF_MODELS[name](value)


CASES = [
    (lambda: F.masked_linear(X, W, [0.0] * 4), TypeError,
     "threshold must be a torch.Tensor, but is [0.0, 0.0, 0.0, 0.0]"),
    (lambda: F.masked_weight(W, 0.5), TypeError, "threshold must be a torch.Tensor, but is 0.5"),
    (lambda: F.threshold_mask(W, None), TypeError, "threshold must be a torch.Tensor, but is None"),
    (lambda: F.remaining_ratio("w", T), TypeError, "weight must be a torch.Tensor, but is 'w'"),
    (lambda: F.masked_linear([1.0], W, T), TypeError, "input must be a torch.Tensor, but is [1.0]"),
    (lambda: F.masked_linear(X, W, T, 0.0), TypeError, "bias must be a torch.Tensor, but is 0.0"),
    (lambda: F.masked_conv2d(IMAGE, FILTERS, 0.5), TypeError, "threshold must be a torch.Tensor"),
    (lambda: F.masked_conv_transpose2d(IMAGE, None, T), TypeError, "weight must be a torch.Tensor"),
    (lambda: F.masked_linear(X, SPARSE, T), TypeError,
     "weight must be a dense tensor (torch.strided), but its layout is torch.sparse_coo"),
    (lambda: F.effective_threshold(W.to_sparse_csr(), T), TypeError,
     "but its layout is torch.sparse_csr: use its to_dense()"),
    (lambda: F.effective_threshold(W, T, backend=["cpu"]), ValueError, "backend must be one of"),
    (lambda: F.masked_conv2d(IMAGE, FILTERS, T, groups="1"), TypeError,
     "groups must be an integer of at least 1, but is '1'"),
    (lambda: F.masked_conv_transpose2d(IMAGE, FILTERS, T, groups=1.0), TypeError,
     "groups must be an integer of at least 1, but is 1.0"),
    (lambda: F.masked_weight(W, T, structure_gradient="no"), TypeError,
     "structure_gradient must be True or False, but is 'no'"),
    (lambda: F.sparse_regularization(None), TypeError,
     "thresholds must be a tensor or several of them, but is None"),
    (lambda: F.sparse_regularization([T, 1.0]), TypeError,
     "thresholds must be a torch.Tensor, but is 1.0"),
    (lambda: F.sparse_regularization(T.int()), TypeError,
     f"thresholds must be {DTYPES}, but one is torch.int32"),
    (lambda: MaskedLinear(3, 4, dtype=torch.int32), TypeError,
     f"dtype must be {DTYPES}, but is torch.int32"),
    (lambda: MaskedConv2d(3, 4, 1, 1, 0, 1, 1, True, "zeros", None, torch.complex64), TypeError,
     f"dtype must be {DTYPES}, but is torch.complex64"),
    (lambda: MaskedLSTM(3, 4, path="mixed"), ValueError,
     "path must be one of auto, packed, but is 'mixed', since torch multiplies"),
    (lambda: MaskedLinear(3, 4, structure_gradient=1), TypeError,
     "must be True or False, but is 1"),
    (lambda: MaskedLinear(3, 4).reset_threshold("a"), TypeError, "value must be a number, but is"),
    (lambda: DSTSGD(model()).clip_grad_norm_("a"), TypeError, "max_norm must be a number of at"),
    (lambda: DSTSGD(model()).clip_grad_norm_(float("nan")), ValueError, "max_norm must be at"),
    (lambda: DSTAdamW(model()).load_state_dict({}), TypeError, "state_dict must be a dict, as an"),
    (lambda: mask_parameter_(None, "weight"), TypeError, "module must be a torch.nn.Module"),
    (lambda: d.SparsifyConfig(min_numel="a"), TypeError,
     "min_numel must be an integer of at least 0, but is 'a'"),
    (lambda: d.SparsifyConfig(skip_first="yes"), TypeError,
     "skip_first must be True or False, but is 'yes'"),
    (lambda: d.SparsifyConfig.from_dict(None), TypeError, "values must be a dict"),
    (lambda: d.sparsify_(dense(), {"granularity": "row"}), TypeError,
     "config must be a SparsifyConfig or None, but is a dict"),
    (lambda: d.sparsify_(dense(), filter_fn="fc"), TypeError,
     "filter_fn must be a function of a module and its name, or None, but is 'fc'"),
    (lambda: d.finalize_(model(), format=None), ValueError, "format must be one of dense"),
    (lambda: d.group_(model(), float("inf")), ValueError,
     "bucket_mb must be positive and finite, but is inf"),
    (lambda: d.group_(model(), "25"), TypeError,
     "bucket_mb must be a number, positive and finite, but is '25'"),
    (lambda: d.parameter_groups(model(), lr="0.1"), TypeError, "lr must be a number, at least 0"),
    (lambda: d.parameter_groups(model(), threshold_weight_decay=None), TypeError,
     "threshold_weight_decay must be a number, at least 0 and finite, but is None"),
    (lambda: d.parameter_groups(model(), threshold_lr=-1.0), ValueError,
     "threshold_lr must be at least 0 and finite, but is -1.0"),
    (lambda: d.check_masks(model(), X, optimizers=0.1), TypeError,
     "optimizers must be optimizers in a list, but is 0.1"),
    (lambda: d.check_masks(model(), X, optimizers=[PARAMETERS[0]]), TypeError,
     "optimizers must be optimizers in a list, but is a list with a Parameter"),
]  # fmt: skip
OF_GROUPS = [
    (DSTSGD, {"alpha": -1}, ValueError, "alpha must be at least 0 and finite, but is -1"),
    (DSTAdamW, {"alpha": float("nan")}, ValueError, "alpha must be at least 0 and finite, but is"),
    (DSTSGD, {"momentum": "a"}, TypeError, "momentum must be a number, at least 0"),
    (DSTSGD, {"dampening": None}, TypeError, "dampening must be a number"),
    (DSTSGD, {"nesterov": "no"}, TypeError, "nesterov must be True or False, but is 'no'"),
    (DSTSGD, {"maximize": 2}, TypeError, "maximize must be True or False, but is 2"),
    (DSTSGD, {"weight_decay": None}, TypeError, "weight_decay must be a number"),
    (DSTAdamW, {"weight_decay": float("inf")}, ValueError, "weight_decay must be at least 0 and"),
    (DSTAdamW, {"betas": (0.9, 0.99, 0.999)}, TypeError,
     "betas must be two numbers in [0, 1), but is (0.9, 0.99, 0.999)"),
    (DSTAdamW, {"betas": 0.9}, TypeError, "betas must be two numbers in [0, 1), but is 0.9"),
    (DSTAdamW, {"eps": "1e-8"}, TypeError, "eps must be a number, at least 0"),
]  # fmt: skip
for optimizer, options, error, words in OF_GROUPS:
    for run in (
        lambda optimizer=optimizer, options=options: optimizer(model(), **options),
        lambda optimizer=optimizer, options=options: group(optimizer, **options),
    ):
        CASES.append((run, error, words))


@pytest.mark.parametrize(("run", "error", "words"), CASES, ids=[case[2][:40] for case in CASES])
def test_what_is_refused(run, error, words):
    with pytest.raises(error, match=re.escape(words)):
        run()
