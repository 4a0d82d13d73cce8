"""What is refused, in words that name the argument, what it is and what is accepted."""

from __future__ import annotations

import pytest
import torch
from networks import linear
from torch import nn

from dst_kernels import sparse_regularization
from dst_kernels.backends import choice
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD, DSTAdamW

NUMBER = "must be a number, at least 0 and finite, but is"
ONE = "must be a number or a tensor with one element, but is a tensor of shape"
ERRORS = (TypeError, ValueError)
BAD_OPTIONS = [
    ({"lr": -0.1}, "lr must be at least 0 and finite, but is -0.1"),
    ({"lr": float("nan")}, "lr must be at least 0 and finite, but is nan"),
    ({"lr": None}, f"lr {NUMBER} None"),
    ({"lr": torch.ones(2)}, f"lr {ONE}"),
    ({"weight_decay": -1}, "weight_decay must be at least 0 and finite, but is -1"),
    ({"alpha": "a lot"}, f"alpha {NUMBER} 'a lot'"),
    ({"alpha": torch.ones(3)}, f"alpha {ONE}"),
    ({"bucket_mb": 0}, "bucket_mb must be positive and finite, but is 0"),
    ({"backend": "fast"}, "backend must be one of auto, reference, .*, but is 'fast'"),
    ({"backend": "triton"}, "one of auto, reference, cpu, cuda, but is 'triton', which has no"),
    ({"params": []}, "empty parameter list"),
]
OF_SGD = [
    ({"momentum": -0.5}, "momentum must be at least 0 and finite, but is -0.5"),
    ({"nesterov": True}, "nesterov needs momentum above 0 and dampening 0, but they are 0.0 and"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "but they are 0.9 and 0.5"),
]
OF_ADAMW = [
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), but are \(0.9, 1.0\)"),
    ({"betas": (-0.1, 0.9)}, r"betas must be two numbers in \[0, 1\), but are \(-0.1, 0.9\)"),
    ({"eps": -1e-8}, "eps must be at least 0 and finite, but is -1e-08"),
]
CASES = [(cls, *case) for cls in (DSTSGD, DSTAdamW) for case in BAD_OPTIONS]
CASES += [(DSTSGD, *case) for case in OF_SGD] + [(DSTAdamW, *case) for case in OF_ADAMW]
of_group = [case for case in CASES if not case[1].keys() & {"bucket_mb", "backend", "params"}]


@pytest.fixture
def backend(best_backend):
    return best_backend


def test_arguments():
    for optimizer, options, message in CASES:
        model, _ = linear()
        with pytest.raises(ERRORS, match=message):
            optimizer(model, **options)
        assert all(layer._deferral is None for layer in model[::2]), "the model is free"
        optimizer(model)


def test_options_of_groups():
    """Of the constructor, of groups that come later, and of a state dict."""
    for optimizer, options, message in of_group:
        model, _ = linear()
        with pytest.raises(ERRORS, match=message):
            optimizer(model, [{"params": model.parameters(), **options}])
        made = optimizer(model, list(model[0].parameters()))
        with pytest.raises(ERRORS, match=message):
            made.add_param_group({"params": list(model[2].parameters()), **options})
        assert len(made.param_groups) == 1 and model[2]._deferral is None
        state = made.state_dict()
        state["param_groups"][0].update(options)
        with pytest.raises(ERRORS, match=message):
            made.load_state_dict(state)


def test_there_is_no_amsgrad():
    model, _ = linear()
    with pytest.raises(TypeError, match="amsgrad"):
        DSTAdamW(model, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        DSTAdamW(model, [{"params": model.parameters(), "amsgrad": True}])


@pytest.mark.parametrize("optimizer", [DSTSGD, DSTAdamW])
def test_parameters_in_place_of_the_model(optimizer):
    model, _ = linear()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is a generator"):
        optimizer(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"params must be parameters, .* or None .*, but is 0.1"):
        optimizer(model, 0.1)


def test_a_layer_of_another_optimizer_is_not_added():
    """Nor does it leave the group there, or the optimizer without its own layers."""
    model, _ = linear()
    first = DSTSGD(model, list(model[0].parameters()), lr=0.1)
    other = DSTSGD(model, list(model[2].parameters()), lr=0.1)
    with pytest.raises(ValueError, match="1 of its layers belong to another optimizer"):
        first.add_param_group({"params": list(model[2].parameters())})
    assert len(first.param_groups) == 1
    assert model[0]._deferral is first._deferral and model[2]._deferral is other._deferral


@pytest.mark.parametrize("alpha", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def test_the_regulariser_in_the_loss_and_in_the_optimizer(alpha):
    model, _ = linear()
    optimizer = DSTSGD(model, alpha=alpha)
    sparse_regularization(model).mul(0).backward()
    with pytest.raises(RuntimeError, match=r"counts twice: .*given alpha; leave one of them out"):
        sparse_regularization(model).backward()
    for group in optimizer.param_groups:
        group["alpha"] = 0.0
    optimizer.step()
    sparse_regularization(model).backward()
    optimizer.release()
    DSTSGD(model)
    sparse_regularization(model).backward()


def test_sparse_gradients(backend):
    embedding = nn.Embedding(5, 4, sparse=True)
    model = nn.Sequential(embedding, MaskedLinear(4, 3, backend=backend))
    optimizer = DSTSGD(model, lr=0.1, backend=backend)
    model(torch.tensor([1, 2])).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"sparse gradients .* shape \[5, 4\].* sparse=False"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def step_with(*parameters):
    model, _ = linear()
    optimizer = DSTSGD(model, [*model.parameters(), *parameters], lr=0.1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_parameters_that_no_op_can_take():
    with pytest.raises(ValueError, match=r"params: .* real floating-point .*\[3\] is .*complex64"):
        step_with(nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"params: .* dense in memory, .*\[3\] has strides \[2\]"):
        step_with(nn.Parameter(torch.ones(6)[::2]))
    step_with(nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(())))


def test_the_backend_for_gpus_on_a_cpu():
    """In the constructor where there is no such library, in the step at the latest."""
    layer = MaskedLinear(4, 3)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot serve: .*or 'reference'"):
        optimizer = DSTSGD(layer, lr=0.1, backend="cuda")
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def test_no_compiled_library(monkeypatch):
    """The reason is in the message; "auto" does without."""
    monkeypatch.setattr(choice.library, "unavailable", lambda name: "it was not built")
    choice.forget()
    layer = MaskedLinear(4, 3)
    DSTSGD(layer, lr=0.1).release()
    with pytest.raises(RuntimeError, match="backend='cpu' cannot serve: it was not built"):
        DSTSGD(layer, lr=0.1, backend="cpu")
    choice.forget()
