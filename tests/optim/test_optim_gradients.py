"""What stands in `.grad` between backward and step, and what may happen to it there."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import channels_last, conv2d, linear, other_granularities, with_dense_layers
from ops.tolerance import assert_as_accurate
from torch.nn import functional as F
from twins import Twins, assert_close, batches, masked_layers

import dst_kernels
from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD

STEPS = 12
SINGLE = 1e-6  # norms are float32 numbers
NETWORKS = [linear, with_dense_layers, channels_last, other_granularities]


def make(network, backend, rule="sgd", **options):
    model, shape = network(backend=backend)
    options = {"lr": 0.1, **options}
    return Twins(model, rule, backend=backend, **options), batches(shape)


# -- raw G -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [linear, conv2d, channels_last])
def test_the_gradient_of_a_weight_is_that_of_its_masked_weight(network, backend):
    model, shape = network(backend=backend)
    for layer in masked_layers(model):
        layer.reset_threshold(0.1)
    dense = copy.deepcopy(model)
    optimizer = DSTSGD(model, backend=backend)
    for layer in masked_layers(dense):  # all kept: nothing but the product is left
        with torch.no_grad():
            layer.weight.mul_(layer.mask())
            layer.reset_threshold(-1e9)
        layer.structure_gradient, layer.surrogate = False, "rectangular"
    input, target = batches(shape)[0]
    for each in (model, dense):
        F.cross_entropy(each(input), target).backward()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        if "threshold" in name:
            assert p.grad is None
        else:
            assert p.grad.stride() == p.stride()
            assert_close(p.grad, q.grad, name)
    optimizer.release()


def test_the_dtype_of_gradients(backend):
    """That of the product, but no float16 beside a float32 weight: GradScaler takes none."""
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for weight, autocast, expected in (
        *((dtype, None, dtype) for dtype in (f64, f32, bf16, f16)),
        *((f32, bf16, bf16), (bf16, bf16, bf16), (f32, f16, f32), (f64, bf16, f64)),
    ):
        layer = MaskedLinear(6, 4, bias=False, dtype=weight, backend=backend)
        optimizer = DSTSGD(layer, lr=0.1, momentum=0.9, backend=backend)
        input = torch.randn(5, 6, dtype=weight)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = layer(input).square().sum()
            loss.backward()
            assert layer.weight.grad.dtype == expected and layer.threshold.grad is None
            optimizer.step()
            assert layer.weight.dtype == weight


def test_a_change_of_autocast_reaches_the_next_gradient(backend):
    layer = MaskedLinear(6, 4, backend=backend)
    optimizer = DSTSGD(layer, lr=0.1, backend=backend)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            layer(torch.randn(3, 6)).float().sum().backward()
        small = dtype == torch.bfloat16
        assert layer.weight.grad.dtype == (dtype if small else torch.float32)
        optimizer.step()


# -- sums over micro-batches -------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_of_16_bits_are_summed_in_32(set_to_none, backend):
    """To the error of torch's own sums; the first alone stays as it is."""
    model, shape = linear(backend=backend)
    model.float()
    plain, exact = (dst_kernels.group_(copy.deepcopy(model)) for _ in "ab")
    exact.double()
    optimizer = DSTSGD(model, lr=0.1, backend=backend)
    data = batches(shape, count=32, dtype=torch.float32)
    for i, (input, target) in enumerate([*data[:2], *data]):
        if i in (0, 2):
            for each in (model, plain, exact):
                each.zero_grad(set_to_none)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [F.cross_entropy(each(input), target) for each in (model, plain)]
        for loss in (*losses, F.cross_entropy(exact(input.double()), target)):
            loss.backward()
        if i == 0:
            assert model[0].weight.grad.dtype == torch.bfloat16
    optimizer.step()
    for each in (plain, exact):
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for p, q, r in zip(*(each.parameters() for each in (model, plain, exact)), strict=True):
        assert_as_accurate(p.detach(), q.detach(), r.detach())


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("network", NETWORKS)
def test_accumulation(network, rule, backend):
    twins, data = make(network, backend, rule, alpha=0.05)
    for _ in range(STEPS):
        twins.both(lambda side: side.optimizer.zero_grad())
        alphas = twins.alphas
        for input, target in data:
            for side in twins.sides:
                loss = side.loss(input, target)
                (loss + side.regularizer(alphas)).backward()
            alphas = [None] * len(alphas)  # in one of the micro-batches
        twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


def test_micro_batches_of_one_backward(backend):
    """Two forwards, whose losses then go backward together."""
    twins, data = make(linear, backend, alpha=0.05, momentum=0.9)
    for _ in range(STEPS):
        twins.both(lambda side: side.optimizer.zero_grad())
        for side in twins.sides:
            losses = [side.loss(*batch) for batch in data[:3]]
            (sum(losses) + side.regularizer(twins.alphas)).backward()
        twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_set_to_zero(network, rule, backend):
    """As in torch.optim a gradient of zeros is one: momentum goes on."""
    options = {"momentum": 0.9} if rule == "sgd" else {}
    twins, data = make(network, backend, rule, alpha=0.05, **options)
    twins.step(*data[0])
    for _ in range(STEPS):
        twins.both(lambda side: side.optimizer.zero_grad(set_to_none=False))
        for layer in masked_layers(twins.ours.model):
            assert not layer.weight.grad.any()
        twins.backward(*data[1])
        twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


# -- norms and clipping ------------------------------------------------------------------------


def exact_norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("alpha_in_loss", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("network", NETWORKS)
def test_grad_norm(network, alpha, alpha_in_loss, backend):
    """That of dW, dt and all others, as torch would find them; in float32."""
    twins, data = make(network, backend, alpha=alpha, alpha_in_loss=alpha_in_loss)
    twins.train(data, 3)
    twins.both(lambda side: side.optimizer.zero_grad())
    twins.backward(*data[0])
    norm = twins.ours.optimizer.grad_norm()
    assert norm.shape == ()
    assert_close(norm.double(), exact_norm(twins.theirs.model).double(), "norm", SINGLE)


def test_grad_norm_without_gradients(backend):
    twins, _ = make(linear, backend)
    assert twins.ours.optimizer.grad_norm().item() == 0


@pytest.mark.parametrize("alpha_in_loss", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_clipping(rule, network, alpha_in_loss, backend):
    """As torch's on exact gradients; some limits are not reached. `.grad` stays as it is."""
    options = {"momentum": 0.9, "dampening": 0.5} if rule == "sgd" else {}
    twins, data = make(network, backend, rule, alpha=0.05, alpha_in_loss=alpha_in_loss, **options)
    twins.tolerance = 20 * SINGLE
    clipped = 0
    for i in range(STEPS):
        max_norm = 1e6 if i % 6 == 3 else 0.02 * (i + 1)
        twins.both(lambda side: side.optimizer.zero_grad())
        twins.backward(*data[i % 4])
        before = [p.grad.clone() for p in twins.ours.model.parameters() if p.grad is not None]
        norm = twins.ours.optimizer.clip_grad_norm_(max_norm)
        clipped += int(norm > max_norm)
        expected = torch.nn.utils.clip_grad_norm_(twins.theirs.model.parameters(), max_norm)
        assert_close(norm.double(), expected, "norm", twins.tolerance)
        after = [p.grad for p in twins.ours.model.parameters() if p.grad is not None]
        assert all(map(torch.equal, before, after))
        twins.both(lambda side: side.optimizer.step())
    assert 3 <= clipped < STEPS
    twins.assert_same(data[0][0])


def test_clipping_holds_for_one_step(backend):
    """Neither the step after next nor gradients that were thrown away are scaled."""
    twins, data = make(linear, backend)
    for dropped in (True, False):
        twins.tolerance = Twins.tolerance
        twins.step(*data[0])
        twins.both(lambda side: side.optimizer.zero_grad())
        twins.backward(*data[1])
        twins.ours.optimizer.clip_grad_norm_(1e-3)
        if not dropped:
            torch.nn.utils.clip_grad_norm_(twins.theirs.model.parameters(), 1e-3)
            twins.both(lambda side: side.optimizer.step())
            twins.tolerance = SINGLE
        for side in twins.sides:  # the optimizer does not know of what a model does
            (side.optimizer if dropped else side.model).zero_grad()
        twins.backward(*data[2])
        twins.both(lambda side: side.optimizer.step())
        twins.assert_same(data[0][0])


def test_clipping_by_torch_scales_raw_gradients(backend):
    """Allowed, with another norm: that of the dense gradients, dt not among them."""
    twins, data = make(linear, backend)
    optimizer, model = twins.ours.optimizer, twins.ours.model
    twins.backward(*data[0])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert 0.01 < norm < 100 and norm > optimizer.grad_norm() > 0
    for p in twins.theirs.model.parameters():
        p.grad.mul_((0.01 / (norm + 1e-6)).clamp(max=1))
    twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


@pytest.mark.parametrize("network", [conv2d, channels_last])
def test_gradients_of_another_layout(network, backend):
    """As from a flat buffer: the step goes by the weight's strides."""
    twins, data = make(network, backend, momentum=0.9)
    for i in range(3):
        twins.both(lambda side: side.optimizer.zero_grad())
        twins.backward(*data[i])
        for p in twins.ours.model.parameters():
            if p.dim() == 4:
                other = torch.channels_last if p.is_contiguous() else torch.contiguous_format
                p.grad = p.grad.contiguous(memory_format=other)
            elif p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()
        twins.both(lambda side: side.optimizer.step())
    twins.assert_same(data[0][0])


def test_other_hands_on_raw_gradients(backend):
    """Anything linear: a hook on the tensor, a factor, an average. It acts on dW and dt alike."""
    twins, data = make(linear, backend, momentum=0.9)
    layer = masked_layers(twins.ours.model)[0]
    other = masked_layers(twins.theirs.model)[0]
    layer.weight.register_hook(lambda grad: grad / 2)
    for p in (other.weight, other.threshold):
        p.register_hook(lambda grad: grad / 2)
    twins.train(data, STEPS)
    twins.assert_same(data[0][0])
