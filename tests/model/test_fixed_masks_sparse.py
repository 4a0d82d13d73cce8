"""Fixed masks on the path "sparse": right is what the path "packed" computes."""

import copy
import io

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.methods import SET
from dst_kernels.nn import MaskedConv2d, MaskedLayer, MaskedLinear

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}


NETWORKS = {
    "linear": lambda: [nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh()],
    "convolutions": lambda: [
        nn.Unflatten(1, (2, 4, 5)),
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, (2, 3), (2, 1), (0, 1), groups=2),  # [8, 2, 5]
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3, 2, dilation=2),  # [4, 3]
        nn.Flatten(),
        nn.Linear(12, 20),
    ],
}
every_network = pytest.mark.parametrize("kind", NETWORKS)


def network(path, dtype=torch.float64, density=0.2, fixed=True, kind="linear"):
    torch.manual_seed(0)
    model = nn.Sequential(*NETWORKS[kind](), nn.Linear(20, 3))
    model = dst_kernels.sparsify_(model.to(dtype))
    for layer in masked(model):
        layer.path = path
        if fixed:
            layer.masked_weights()[0].set_fixed_mask(torch.rand_like(layer.weight) < density)
    return model


def masked(model):
    return [layer for layer in model if isinstance(layer, MaskedLayer)]


def batches(count, dtype):
    torch.manual_seed(1)
    return [(torch.randn(9, 40).to(dtype), torch.randn(9, 3).to(dtype)) for _ in range(count)]


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def weights(model):
    return [each.detach() for each in model.parameters()]


@every_network
@pytest.mark.parametrize("dtype", CLOSE)
def test_training_equals_that_on_the_packed_path(dtype, kind):
    models = [network(path, dtype, kind=kind) for path in ("packed", "sparse")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step, (x, y) in enumerate(batches(50, dtype)):
            if step == 25:
                torch.manual_seed(step)
                part = masked(model)[1].masked_weights()[0]
                part.set_fixed_mask(torch.rand_like(part.weight) < 0.1)
            (model(x) - y).square().mean().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    close(weights(models[1]), weights(models[0]), dtype)


@every_network
@pytest.mark.parametrize("path", ["packed", "sparse"])
def test_only_kept_weights_are_read_and_have_gradients(path, kind):
    model = network(path, kind=kind)
    with torch.no_grad():
        for layer in masked(model):
            layer.weight.masked_fill_(~layer.mask(), float("nan"))
    model(batches(1, torch.float64)[0][0]).sum().backward()
    for layer in masked(model):
        assert layer.weight.grad[~layer.mask()].eq(0).all()
        assert layer.weight.grad[layer.mask()].isfinite().all()


@every_network
def test_a_method_that_moves_masks(kind):
    models = [network(path, fixed=False, kind=kind) for path in ("packed", "sparse")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        method = SET(model, optimizer, density=0.2, every=5)
        for x, y in batches(20, torch.float64):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
    close(weights(models[1]), weights(models[0]), torch.float64)
    for packed, sparse in zip(*map(masked, models), strict=True):
        assert torch.equal(sparse.mask(), packed.mask())


@every_network
def test_gradients_of_gradients_and_many_at_a_time(kind):
    x = torch.randn(9, 40, dtype=torch.float64, requires_grad=True)
    found = []
    for path in ("packed", "sparse"):
        model = network(path, kind=kind)
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


@every_network
def test_a_mask_that_changes_before_backward_is_refused(kind):
    model = network("sparse", kind=kind)
    loss = model(batches(1, torch.float64)[0][0]).sum()
    layer = masked(model)[0]
    layer.masked_weights()[0].set_fixed_mask(layer.mask())
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
@pytest.mark.parametrize(
    ("build", "shape", "operation"),
    [
        (lambda: MaskedLinear(200, 100), (64, 200), nn.functional.linear),
        (lambda: MaskedConv2d(64, 64, 3), (16, 64, 16, 16), nn.functional.conv2d),
    ],
    ids=["linear", "convolution"],
)
def test_the_planner_decides_on_auto(build, shape, operation, density, nodes):
    layer = build()
    part = layer.masked_weights()[0]
    part.set_fixed_mask(torch.rand_like(layer.weight) < density)
    x = torch.randn(shape)
    assert ("WithValues" in type(layer(x).grad_fn).__name__) is nodes
    with torch.no_grad():
        dense = operation(x, part.baked(), layer.bias)
        torch.testing.assert_close(layer(x), dense)
    part.set_fixed_mask(layer.mask(), dense_gradient=True)
    layer(x).sum().backward()
    assert layer.weight.grad[~layer.mask()].ne(0).any()
