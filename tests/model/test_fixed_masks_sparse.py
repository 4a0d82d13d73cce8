"""Fixed masks on the path "sparse": right is what the path "packed" computes."""

import copy
import io

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.methods import SET
from dst_kernels.nn import MaskedLinear

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}


def network(path, dtype=torch.float64, density=0.2, fixed=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh())
    model = dst_kernels.sparsify_(model.append(nn.Linear(20, 3)).to(dtype))
    for layer in model[::2]:
        layer.path = path
        if fixed:
            layer.masked_weights()[0].set_fixed_mask(torch.rand_like(layer.weight) < density)
    return model


def batches(count, dtype):
    torch.manual_seed(1)
    return [(torch.randn(9, 40).to(dtype), torch.randn(9, 3).to(dtype)) for _ in range(count)]


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def weights(model):
    return [each.detach() for each in model.parameters()]


@pytest.mark.parametrize("dtype", CLOSE)
def test_training_equals_that_on_the_packed_path(dtype):
    models = [network(path, dtype) for path in ("packed", "sparse")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step, (x, y) in enumerate(batches(50, dtype)):
            if step == 25:
                torch.manual_seed(step)
                part = model[2].masked_weights()[0]
                part.set_fixed_mask(torch.rand_like(part.weight) < 0.1)
            (model(x) - y).square().mean().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    close(weights(models[1]), weights(models[0]), dtype)


@pytest.mark.parametrize("path", ["packed", "sparse"])
def test_only_kept_weights_are_read_and_have_gradients(path):
    model = network(path)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.masked_fill_(~layer.mask(), float("nan"))
    model(batches(1, torch.float64)[0][0]).sum().backward()
    for layer in model[::2]:
        assert layer.weight.grad[~layer.mask()].eq(0).all()
        assert layer.weight.grad[layer.mask()].isfinite().all()


def test_a_method_that_moves_masks():
    models = [network(path, fixed=False) for path in ("packed", "sparse")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        method = SET(model, optimizer, density=0.2, every=5)
        for x, y in batches(20, torch.float64):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
    close(weights(models[1]), weights(models[0]), torch.float64)
    for packed, sparse in zip(*[model[::2] for model in models], strict=True):
        assert torch.equal(sparse.mask(), packed.mask())


def test_gradients_of_gradients_and_many_at_a_time():
    x = torch.randn(9, 40, dtype=torch.float64, requires_grad=True)
    found = []
    for path in ("packed", "sparse"):
        model = network(path)
        first = [x, *(each for each in model.parameters() if each.requires_grad)]
        loss = model(x).pow(3).sum()
        grads = torch.autograd.grad(loss, first, create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in grads), first)
        output = model(x)[:2, 0]
        many = torch.autograd.grad(
            output, first, torch.eye(2, dtype=x.dtype), is_grads_batched=True
        )
        found.append([*grads, *second, *many])
    close(found[1], found[0], torch.float64)


def test_a_mask_that_changes_before_backward_is_refused():
    model = network("sparse")
    loss = model(batches(1, torch.float64)[0][0]).sum()
    model[0].masked_weights()[0].set_fixed_mask(model[0].mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_state_dicts_know_nothing_of_it():
    model = network("sparse")
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    x = batches(1, torch.float64)[0][0]
    expected = model(x)
    assert "_known_mask" in vars(model[0])
    assert fresh.keys() == model.state_dict().keys()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert "_known_mask" not in vars(other[0])
        assert torch.equal(other(x), expected)
    dst_kernels.unfreeze_masks_(model)
    assert "_known_mask" not in vars(model[0])


@pytest.mark.parametrize("density, nodes", [(0.05, True), (0.9, False)])
def test_the_planner_decides_on_auto(density, nodes):
    layer = MaskedLinear(200, 100)
    part = layer.masked_weights()[0]
    part.set_fixed_mask(torch.rand_like(layer.weight) < density)
    x = torch.randn(64, 200)
    assert ("WithValues" in type(layer(x).grad_fn).__name__) is nodes
    with torch.no_grad():
        dense = nn.functional.linear(x, part.baked(), layer.bias)
        torch.testing.assert_close(layer(x), dense)
    part.set_fixed_mask(layer.mask(), dense_gradient=True)
    layer(x).sum().backward()
    assert layer.weight.grad[~layer.mask()].ne(0).any()
