"""Training by kept rows: the trajectories of the packed path, and every other reader of W * M."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dst_kernels
from dst_kernels.autograd import kept
from dst_kernels.backends import unavailable
from dst_kernels.optim import DSTSGD, DSTAdamW

WAYS = ["layer by layer", "grouped", "deferred", "deferred adamw"]


def network(path, dtype=torch.float32, kept_share=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 128), nn.ReLU(), nn.Linear(128, 100), nn.ReLU())
    model.append(nn.Linear(100, 10)).to(dtype)
    dst_kernels.sparsify_(model)
    for layer in model[::2]:
        layer.path = path
        limit = layer.weight.detach().abs().double().flatten().quantile(1 - kept_share)
        layer.threshold.data.fill_(limit)
    return model


def optimizer_of(model, way):
    if way == "deferred":
        return DSTSGD(model, lr=0.1, momentum=0.9, alpha=1e-3)
    if way == "deferred adamw":
        return DSTAdamW(model, lr=1e-2, alpha=1e-3)
    if way == "grouped":
        dst_kernels.group_(model)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(step, dtype=torch.float32, size=32):
    generator = torch.Generator().manual_seed(step)
    input = torch.randn(size, 90, generator=generator, dtype=torch.float64)
    return input.to(dtype), torch.randint(0, 10, (size,), generator=generator)


def train(model, optimizer, steps, first=0, dtype=torch.float32):
    for step in range(first, first + steps):
        input, target = batch(step, dtype)
        loss = F.cross_entropy(model(input), target)
        if not isinstance(optimizer, (DSTSGD, DSTAdamW)):
            loss = loss + 1e-3 * dst_kernels.sparse_regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture
def products(monkeypatch):
    """How many products were made by kept rows."""
    made = []
    apply = kept._Product.apply

    def product(input, masked, bias, rows, *how):
        if rows is not None:
            made.append(1)
        return apply(input, masked, bias, rows, *how)

    monkeypatch.setattr(kept._Product, "apply", product)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_200_steps_in_float64_are_those_of_the_packed_path(way, products):
    models = [network(path, torch.float64) for path in ("packed", "sparse")]
    losses = [train(m, optimizer_of(m, way), 200, dtype=torch.float64) for m in models]
    assert len(products) == 600
    assert abs(losses[0] - losses[1]) < 1e-9
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    assert 0.02 < dst_kernels.remaining_ratio(models[1]) < 0.9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_has_the_packed_paths_gradients(way, dtype, products):
    gradients = []
    for path in ("packed", "sparse"):
        model = network(path, dtype)
        train(model, optimizer_of(model, way), 3, dtype=dtype)
        input, target = batch(7, dtype)
        model.zero_grad()
        F.cross_entropy(model(input.requires_grad_()).float(), target).backward()
        gradients.append([input.grad, *(p.grad for p in model.parameters())])
    assert len(products) == 12
    most = 1e-5 if dtype == torch.float32 else 0.03  # of each gradient's norm
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            one, two = one.float(), two.float()
            assert (one - two).norm() <= most * one.norm() > 0


def test_auto_takes_kept_rows_where_they_are_few(products):
    few = 4 if unavailable("cpu") is None else 0
    for share, backend, expected in ((0.05, "auto", few), (0.9, "auto", 0), (0.05, "reference", 0)):
        model = network("auto", kept_share=share)
        for layer in model[::2]:
            layer.backend = backend
        optimizer = optimizer_of(model, "deferred")
        products.clear()
        for _ in range(2):  # W * M from the forward, then from the step
            F.cross_entropy(model(batch(0, size=256)[0]), batch(0, size=256)[1]).backward()
            optimizer.step()
        assert len(products) == expected
        model.eval()
        with torch.no_grad():
            model(batch(0, size=256)[0])
        assert len(products) == expected


@pytest.mark.parametrize("way", ["deferred", "deferred adamw"])
def test_a_resumed_run_goes_on_bit_for_bit(way):
    whole, half = network("auto", kept_share=0.1), network("auto", kept_share=0.1)
    train(whole, optimizer_of(whole, way), 8)
    optimizer = optimizer_of(half, way)
    train(half, optimizer, 4)
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file)
    resumed = network("auto")
    resumed.load_state_dict(states[0])
    optimizer = optimizer_of(resumed, way)
    optimizer.load_state_dict(states[1])
    train(resumed, optimizer, 4, first=4)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_whoever_reads_the_weight_finds_it_dense():
    class Own(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight) + super().forward(input)

    outputs = []
    for path in ("packed", "sparse"):
        torch.manual_seed(0)
        model = nn.Sequential(Own(90, 120))
        dst_kernels.sparsify_(model)
        model[0].path = path
        model[0].threshold.data.fill_(0.08)
        optimizer = DSTSGD(model, lr=0.1)
        for step in range(3):
            output = model(batch(step)[0])
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        outputs.append(output)
    torch.testing.assert_close(*outputs)


def test_a_layer_can_change_between_the_ways_at_any_step():
    paths = ["packed", "sparse", "sparse", "packed", "packed", "sparse", "packed"]
    mixed, packed = network("packed"), network("packed")
    optimizers = [optimizer_of(model, "deferred") for model in (mixed, packed)]
    for step, path in enumerate(paths):
        for layer in mixed[::2]:
            layer.path = path
        for model, optimizer in zip((mixed, packed), optimizers, strict=True):
            train(model, optimizer, 1, first=step)
    for one, two in zip(mixed.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_backward_after_the_step_is_an_error():
    model = network("sparse")
    optimizer = optimizer_of(model, "deferred")
    train(model, optimizer, 2)
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_skipped_step_changes_nothing():
    model = network("sparse")
    optimizer = optimizer_of(model, "deferred")
    train(model, optimizer, 2)
    before = [p.clone() for p in model.parameters()]
    input, target = batch(5)
    outputs = []
    for found in (None, 1.0, 1.0):
        optimizer.found_inf = None if found is None else torch.tensor(found)
        output = model(input)
        outputs.append(output.detach().clone())
        optimizer.zero_grad()
        F.cross_entropy(output, target).backward()
        if found is None:
            continue
        optimizer.step()
    assert torch.equal(outputs[0], outputs[2])
    assert all(map(torch.equal, before, model.parameters()))


def test_the_input_can_be_differentiated_twice():
    found = []
    for path in ("packed", "sparse"):
        layer = network(path, torch.float64)[0]
        input = batch(0, torch.float64)[0].requires_grad_()
        output = layer(input).tanh().sum()
        (first,) = torch.autograd.grad(output, input, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), input)
        found.append((first.detach(), second))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_a_copy_of_a_model_in_training_trains_by_itself():
    model = network("sparse")
    train(model, optimizer_of(model, "deferred"), 3)
    other = copy.deepcopy(model)
    for each in (model, other):
        train(
            each, optimizer_of(each, "deferred") if each is other else optimizer_of_again(each), 3
        )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def optimizer_of_again(model):
    """Return a new optimizer, after the one before has been released."""
    for layer in model[::2]:
        if layer._deferral is not None:
            layer._deferral.release()
    return optimizer_of(model, "deferred")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_products_are_those_of_the_packed_path(backend):
    found = []
    for path in ("packed", "sparse"):
        model = network(path)
        for layer in model[::2]:
            layer.backend = backend
        optimizer = optimizer_of(model, "deferred")
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(batch(step)[0])
                assert output.dtype == torch.bfloat16
                loss = F.cross_entropy(output.float(), batch(step)[1])
                optimizer.zero_grad()
                loss.backward()  # under autocast, too
            optimizer.step()
        found.append(output.float())
    assert (found[0] - found[1]).norm() <= 0.03 * found[0].norm() > 0


def test_rows_that_a_step_shares_among_threads_are_taken_from_the_dense_weight():
    found = []
    for path in ("packed", "sparse"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33_000, 3))
        dst_kernels.sparsify_(model)
        model[0].path = path
        model[0].threshold.data.fill_(0.95 * model[0].weight.detach().abs().max())
        optimizer = DSTSGD(model, lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(torch.randn(4, 33_000))
            output.square().mean().backward()
            optimizer.step()
        found.append(output)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_backend_without_kept_rows_serves_fixed_masks(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DST_KERNELS_BACKEND", "triton")
    model = network("auto", kept_share=0.05)
    dst_kernels.freeze_masks_(model)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    for layer in model[::2]:
        assert bool((layer.weight.grad[~layer.mask()] == 0).all())
        assert bool((layer.weight.grad != 0).any())
