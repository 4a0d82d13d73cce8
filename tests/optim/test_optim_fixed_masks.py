"""Optimizers of this package under fixed masks: the step touches kept weights alone."""

import copy
import io

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.autograd.fixed import _norms_of_sparse_tensors
from dst_kernels.optim import DSTSGD, DSTAdamW

# Older versions of torch cannot clip sparse gradients: there they are dense, for all to use.
SPARSE = _norms_of_sparse_tensors()
where_sparse = pytest.mark.skipif(not SPARSE, reason="torch has no norms of sparse tensors")

OPTIMIZERS = {
    "sgd": lambda model: DSTSGD(model, lr=0.05),
    "momentum": lambda model: DSTSGD(model, lr=0.05, momentum=0.9, weight_decay=0.1, dampening=0.5),
    "nesterov": lambda model: DSTSGD(
        model, lr=0.01, momentum=0.9, nesterov=True, maximize=True, alpha=1e-3
    ),
    "adamw": lambda model: DSTAdamW(model, lr=0.01, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network(path="sparse", dtype=torch.float64, convolution=False):
    """The first two layers have fixed masks, the third one learns its mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh())
    if convolution:
        model[0], model[2] = nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(6, 20, (3, 1), groups=2)
        model[3] = nn.Flatten()
    model = dst_kernels.sparsify_(model.append(nn.Linear(20, 3)).to(dtype))
    for layer in model[:4:2]:
        layer.path = path
        layer.masked_weights()[0].set_fixed_mask(torch.rand_like(layer.weight) < 0.2)
    return model


def train(model, optimizer, steps, micro_batches=1, change_at=None, after=lambda: None):
    torch.manual_seed(1)
    x, y = torch.randn(8, 9, 40), torch.randn(8, 9, 3)
    x, y = x.to(model[0].weight.dtype), y.to(model[0].weight.dtype)
    for step in steps:
        if step == change_at:
            torch.manual_seed(step)
            part = model[2].masked_weights()[0]
            part.set_fixed_mask(torch.rand_like(part.weight) < 0.3)
        for micro in range(micro_batches):
            at = (step + micro) % len(x)
            input = x[at] if model[0].weight.dim() == 2 else x[at].view(9, 4, 5, 2)
            (model(input) - y[at]).square().mean().backward()
        after()
        optimizer.step()
        optimizer.zero_grad()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_optimizer
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("convolution", [False, True])
def test_kept_weights_train_as_on_the_packed_path(build, micro_batches, convolution):
    models = [network(path, convolution=convolution) for path in ("packed", "sparse")]
    before = copy.deepcopy(models[1])
    optimizers = [build(model) for model in models]
    norms = [[], []]
    for model, optimizer, found in zip(models, optimizers, norms, strict=True):
        clip = lambda o=optimizer, found=found: found.append(o.clip_grad_norm_(0.5))  # noqa: E731
        train(model, optimizer, range(30), micro_batches, after=clip)
    close(norms[1], norms[0])
    for packed, sparse, first in zip(*[m[::2] for m in (*models, before)], strict=True):
        mask = packed.mask() if packed._fixed else torch.ones_like(packed.weight, dtype=torch.bool)
        close(sparse.weight[mask], packed.weight[mask])
        close(sparse.bias, packed.bias)
        assert torch.equal(sparse.weight[~mask], first.weight[~mask]) or not SPARSE
        expected = optimizers[0].state.get(packed.weight, {})
        found = optimizers[1].state.get(sparse.weight, {})
        for name, value in expected.items():
            keeps = mask if value.shape == mask.shape else ...
            close(found[name][keeps], value[keeps])


@every_optimizer
@pytest.mark.parametrize("convolution", [False, True])
def test_training_resumes_bit_for_bit(build, convolution):
    kind = {"dtype": torch.float32, "convolution": convolution}
    whole = network(**kind)
    train(whole, build(whole), range(20), change_at=6)
    model = network(**kind)
    optimizer = build(model)
    train(model, optimizer, range(10), change_at=6)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file)
    model = network(**kind)
    model.load_state_dict(states[0])
    optimizer = build(model)
    optimizer.load_state_dict(states[1])
    train(model, optimizer, range(10, 20))
    for resumed, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(resumed, expected)


@where_sparse
def test_writes_between_steps_are_seen():
    model = network()
    optimizer = DSTSGD(model, lr=0.1, momentum=0.9)
    train(model, optimizer, range(3))
    assert model[0].__dict__["_known_mask"]._written
    x = torch.randn(4, 40, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(2)
        expected = nn.functional.linear(x, model[0].masked_weights()[0].baked(), model[0].bias)
    close(model[0](x), expected)
    for see in (optimizer.refresh, model.eval):
        train(model, optimizer, range(1))
        model[0].weight.data.mul_(2)
        see()
        expected = nn.functional.linear(x, model[0].masked_weights()[0].baked(), model[0].bias)
        close(model[0](x), expected)


@where_sparse
def test_the_gradient_is_sparse_only_where_an_optimizer_takes_it():
    x = torch.randn(4, 40, dtype=torch.float64)
    model = network()
    weight = model[0].weight

    def gradient():
        weight.grad = None
        model(x).sum().backward()
        return weight.grad

    dense = gradient()
    assert dense.layout is torch.strided
    optimizer = DSTSGD(model, model[:2].parameters(), lr=0.1)
    optimizer.add_param_group({"params": model[2:].parameters()})
    sparse = gradient()
    assert sparse.layout is torch.sparse_coo and sparse._nnz() == model[0].mask().sum()
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(torch.autograd.grad(model(x).sum(), weight)[0], dense)
    hook = weight.register_hook(lambda grad: 2 * grad)
    assert torch.equal(gradient(), 2 * dense)
    hook.remove()
    assert gradient().is_sparse
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    assert torch.equal(twin[0].weight.grad, dense)
    (weight * dense).sum().backward()  # a term that reads all weights
    assert torch.equal(weight.grad, 2 * dense)
    before = weight.detach().clone()
    optimizer.step()
    close(weight, before - 0.1 * 2 * dense)
    gradient()
    optimizer.release()
    assert weight.grad.layout is torch.strided
    assert gradient().layout is torch.strided


def test_a_gradient_of_another_mask_is_used_as_a_dense_one():
    model = network()
    weight = model[0].weight
    optimizer = DSTSGD(model, lr=0.1)
    model(torch.randn(4, 40, dtype=torch.float64)).sum().backward()
    dense, before = weight.grad.to_dense(), weight.detach().clone()
    model[0].masked_weights()[0].set_fixed_mask(~model[0].mask())
    optimizer.step()
    close(weight, before - 0.1 * dense)


@every_optimizer
def test_a_layer_without_kept_weights(build):
    model = network()
    model[0].masked_weights()[0].set_fixed_mask(torch.zeros(30, 40, dtype=torch.bool))
    before = model[0].weight.detach().clone()
    train(model, build(model), range(3))
    assert torch.equal(model[0].weight, before) or not SPARSE
